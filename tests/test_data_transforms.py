"""Crops and colours: what is cut, what is changed, and what stays as it was."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from fcmae.data.transforms import make_transform


@pytest.mark.parametrize("size", [(40, 80), (64, 64)])
def test_fixed_and_centre_crops(size):
    """Of pixels that tell where they were: what the shorter side becomes, and what is cut."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 200, 320), dtype=np.uint8))
    scale = max(size[0] / 200, size[1] / 320) * 256 / 224
    whole = v2.functional.resize(
        image, [round(200 * scale), round(320 * scale)], v2.InterpolationMode.BICUBIC, antialias=True
    )
    normal = dict(image_size=size, in_chans=3, flip=0.0, mean=[0.0] * 3, std=[1.0] * 3)
    centre = make_transform(**normal, crop="center")(image)
    whole = v2.functional.to_dtype(whole, torch.float32, scale=True)
    assert torch.equal(centre, v2.functional.center_crop(whole, list(size)))
    fixed, places = make_transform(**normal, crop="fixed"), set()
    windows = whole.unfold(1, size[0], 1).unfold(2, size[1], 1)  # (3, y, x, *size)
    for seed in range(6):
        torch.manual_seed(seed)
        same = (windows == fixed(image)[:, None, None]).all(-1).all(-1).all(0).nonzero()
        assert len(same) == 1
        places.add(tuple(same[0].tolist()))
    assert len(places) > 2


def test_the_default_crops_are_as_they_were():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 90, 120), dtype=np.uint8))
    before = v2.Compose([
        v2.RandomResizedCrop((64, 96), scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3),
                             interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3),
    ])  # fmt: skip
    now = make_transform((64, 96), 3, mean=[0.5] * 3, std=[0.25] * 3)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = before(image)
        torch.manual_seed(seed)
        assert torch.equal(now(image), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_jitter_changes_colours_and_nothing_else(channels):
    image = torch.full((channels, 80, 80), 100, dtype=torch.uint8)
    image[:, :40] = 150
    normal = dict(image_size=(64, 64), in_chans=channels, flip=0.0, mean=[0.0] * channels, std=[1.0] * channels)
    jittered = make_transform(**normal, crop="center", color_jitter=0.4)
    plain = make_transform(**normal, crop="center")(image)
    found = []
    for seed in range(8):
        torch.manual_seed(seed)
        found.append(jittered(image))
        ratio = found[-1][:, 40:].mean() / plain[:, 40:].mean()
        assert 0.6**2 * 0.9 < ratio < 1.4**2 * 1.1 and found[-1].max() <= 1
        assert (found[-1][:, :20].std((1, 2)) < 1e-3).all()  # flat stays flat
    assert len({round(f.mean().item(), 4) for f in found}) > 4
