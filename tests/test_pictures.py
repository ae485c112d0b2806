"""The pictures show what they say: visible pixels untouched, predictions brought back to pixels, labels."""

import pytest
import torch
from PIL import Image

from fcmae.loss import normalize_windows, patchify
from fcmae.pictures import reconstruct, reconstruction_sheet
from helpers import close, masks


class Oracle(torch.nn.Module):
    """Predicts the target itself."""

    patch_size, target = 32, None

    def __init__(self, norm_pix, norm_window):
        super().__init__()
        self.norm_pix, self.norm_window = norm_pix, norm_window

    def forward(self, images, mask):
        assert not self.training
        target = normalize_windows(images, self.norm_window or 32) if self.norm_pix else images
        return torch.zeros(()), patchify(target, 32), mask


@pytest.mark.parametrize("norm_pix,window", [(True, None), (True, 16), (True, 64), (False, None)])
def test_a_perfect_prediction_gives_the_image_back(norm_pix, window):
    images, mask = torch.randn(2, 3, 64, 128) * 2 + 1, masks(2, (2, 4))
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None].expand_as(images)
    model = Oracle(norm_pix, window).train()
    masked, filled = reconstruct(model, images, mask)
    assert model.training
    assert torch.isnan(masked[hidden]).all() and torch.equal(masked[~hidden], images[~hidden])
    assert torch.equal(filled[~hidden], images[~hidden])
    close(filled, images, 1e-5)


def test_the_sheet_shows_each_column(tmp_path):
    flat = {"black": -0.5, "white": 0.5, "hidden": float("nan")}
    columns = {name: torch.full((2, 3, 32, 32), value) for name, value in flat.items()}
    reconstruction_sheet(tmp_path / "sheet.png", columns, mean=(0.5,) * 3, std=(1.0,) * 3, title="t")
    with Image.open(tmp_path / "sheet.png") as picture:
        row = [
            picture.convert("L").getpixel((picture.width * (2 * i + 1) // 6, picture.height * 3 // 4)) for i in range(3)
        ]
    assert row[0] < 5 and row[1] > 250 and 120 < row[2] < 136
