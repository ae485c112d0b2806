"""The masked-pixel loss against its definition, written out in loops."""

import pytest
import torch

from fcmae.loss import masked_pixel_loss, patchify, unpatchify
from helpers import close, masks


def by_hand(pred, images, mask, patch, norm_window):
    """One masked patch after another, in float64."""
    b, c, h, w = images.shape
    target = images.double().clone()
    if norm_window:
        for i in range(b):
            for y in range(0, h, norm_window):
                for x in range(0, w, norm_window):
                    square = target[i, :, y : y + norm_window, x : x + norm_window]
                    target[i, :, y : y + norm_window, x : x + norm_window] = (square - square.mean()) / (
                        square.var() + 1e-6
                    ).sqrt()
    unit = h // mask.shape[1]
    losses = []
    for i in range(b):
        for row in range(h // patch):
            for col in range(w // patch):
                if mask[i, row * patch // unit, col * patch // unit]:
                    square = target[i, :, row * patch : (row + 1) * patch, col * patch : (col + 1) * patch]
                    guess = pred[i, row * (w // patch) + col].double().view(patch, patch, c).permute(2, 0, 1)
                    losses.append((guess - square).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(
    "patch,unit,window",
    [(32, 32, 32), (32, 32, None), (32, 32, 16), (16, 32, 32), (16, 16, 16), (8, 32, 32), (32, 32, 64)],
)
def test_definition(channels, patch, unit, window):
    torch.manual_seed(0)
    images = torch.randn(2, channels, 64, 128) * 3 + 1
    pred = torch.randn(2, (64 // patch) * (128 // patch), patch * patch * channels)
    mask = masks(2, (64 // unit, 128 // unit))
    loss = masked_pixel_loss(pred, images, mask, patch, norm_pix=window is not None, norm_window=window)
    close(loss[None], by_hand(pred, images, mask, patch, window)[None], 1e-5)


def test_visible_patches_do_not_count():
    images, pred, mask = torch.randn(2, 3, 64, 64), torch.randn(2, 4, 3072), masks(2, (2, 2), 0.5)
    other = torch.where(mask.flatten(1)[..., None], pred, torch.full_like(pred, 1e6))
    assert torch.equal(masked_pixel_loss(pred, images, mask, 32), masked_pixel_loss(other, images, mask, 32))


def test_always_fp32():
    images, mask = torch.randn(2, 3, 64, 64) * 100, masks(2, (2, 2), 0.5)
    pred = torch.randn(2, 4, 3072).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = masked_pixel_loss(pred, images, mask, 32)
    assert low.dtype == torch.float32
    assert torch.equal(low, masked_pixel_loss(pred.float(), images, mask, 32))


def test_patchify_order_and_inverse():
    images = torch.arange(2 * 3 * 8 * 12).float().view(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert (
        patches[1, 4, (2 * 4 + 3) * 3 + 1] == images[1, 1, 4 + 2, 4 + 3]
    )  # patch row 1, column 1; pixel (2, 3); channel 1
    assert torch.equal(unpatchify(patches, 4, (8, 12)), images)


def test_window_must_divide_the_image():
    with pytest.raises(ValueError, match="norm_window=48"):
        masked_pixel_loss(torch.zeros(1, 4, 3072), torch.zeros(1, 3, 64, 64), masks(1, (2, 2), 0.5), 32, True, 48)
