"""What happens to a decoded image before the model sees it: crop, flip, colour jitter, scale, normalize."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fcmae.errors import UsageError, nearest

CROPS = ("random", "fixed", "center")
MAX_ASPECT = 32  # of a longer image only so much of its middle is scaled, which a crop is taken from
CROP = 224 / 256  # side of a fixed or centre crop as a share of the scaled image's shorter side
JITTERED = (1, 3)  # channels that colour jitter is for

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def stats(
    in_chans: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of `in_chans` values each, for pixels in [0, 1]. None: ImageNet's for 3 channels, else 0.5.

    Raises UsageError for another number of values or a std that is not positive.
    """
    default_mean = IMAGENET_MEAN if in_chans == 3 else (0.5,) * in_chans
    default_std = IMAGENET_STD if in_chans == 3 else (0.5,) * in_chans
    mean = default_mean if mean is None else tuple(float(v) for v in mean)
    std = default_std if std is None else tuple(float(v) for v in std)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != in_chans:
            raise UsageError(f"{name} has {len(values)} values but in_chans={in_chans}; give one per channel")
    if min(std) <= 0:
        raise UsageError(f"std={list(std)} must be positive in every channel")
    return mean, std


def make_transform(
    image_size: tuple[int, int],
    in_chans: int,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop: str = "random",
    color_jitter: float = 0.0,
) -> Callable[[Tensor], Tensor]:
    """A torchvision v2 pipeline, (C, H, W) uint8 or float32 -> (C, *image_size) float32, normalized.

    crop `random` is the augmentation of MAE (arXiv 2111.06377, appendix A.1) and FCMAE: crops of `crop_scale` of the
    area, aspect 3/4 to 4/3, bicubic; `flip` is the probability of a horizontal flip. 8-bit pixels stay in [0, 1]
    (uint8 saturates when resized); float images may overshoot their range a little, as bicubic does.
    The others are of MAE's table 1e: `fixed` resizes the image, aspect kept, until its shorter side is 256/224 of the
    crop's, and cuts a random crop of image_size out; `center` the centre. color_jitter scales brightness, contrast and
    saturation by factors in [1 - j, 1 + j]; pixels are then in [0, 1].
    Randomness: torch's CPU generator. Raises UsageError for values out of range.
    """
    from torchvision.transforms import InterpolationMode, v2

    low, high = crop_scale
    if not 0 < low <= high <= 1:
        raise UsageError(f"crop_scale={[low, high]} are shares of the image's area: 0 < low <= high <= 1")
    if not 0 <= flip <= 1:
        raise UsageError(f"flip={flip} is a probability; it must lie between 0 and 1")
    if crop not in CROPS:
        raise UsageError(f"unknown data.crop {crop!r}; known: {', '.join(CROPS)}{nearest(crop, CROPS)}")
    if color_jitter and in_chans not in JITTERED:
        raise UsageError(f"data.color_jitter={color_jitter} is for 1 or 3 channels, not {in_chans}; set it to 0")
    mean, std = stats(in_chans, mean, std)
    size, bicubic = tuple(image_size), InterpolationMode.BICUBIC
    if crop == "random":
        cut = [v2.RandomResizedCrop(size, (low, high), ratio=(3 / 4, 4 / 3), interpolation=bicubic, antialias=True)]
    else:
        cut = [Surrounding(size), v2.RandomCrop(size) if crop == "fixed" else v2.CenterCrop(size)]
    jitter = [v2.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
    return v2.Compose(
        [*cut, v2.RandomHorizontalFlip(flip), *jitter, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    )


class Surrounding:
    """Resizes an image, aspect kept, so that a crop of (H, W) pixels is the share `part` of its shorter side."""

    def __init__(self, crop: tuple[int, int], part: float = CROP, interpolation: str = "bicubic"):
        self.crop, self.part, self.interpolation = crop, part, interpolation

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        most = MAX_ASPECT * min(image.shape[-2:])  # a line of 30,000 pixels would be scaled to gigabytes
        image = F.center_crop(image, [min(side, most) for side in image.shape[-2:]])
        sides = image.shape[-2:]
        scale = max(c / s for c, s in zip(self.crop, sides, strict=True)) / self.part
        size = [max(c, math.floor(s * scale)) for c, s in zip(self.crop, sides, strict=True)]
        return F.resize(image, size, InterpolationMode(self.interpolation), antialias=True)
