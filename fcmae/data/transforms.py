"""What happens to a decoded image before the model sees it: random resized crop, flip, scale, normalize."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fcmae.errors import UsageError

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
) -> Callable[[Tensor], Tensor]:
    """A torchvision v2 pipeline, (C, H, W) uint8 or float32 -> (C, *image_size) float32, normalized.

    The augmentation of MAE (arXiv 2111.06377, appendix A.1) and FCMAE: crops of `crop_scale` of the area,
    aspect 3/4 to 4/3, bicubic; `flip` is the probability of a horizontal flip. 8-bit pixels stay in [0, 1]
    (uint8 saturates when resized); float images may overshoot their range a little, as bicubic does.
    Randomness: torch's CPU generator.
    """
    from torchvision.transforms import InterpolationMode, v2

    low, high = crop_scale
    if not 0 < low <= high <= 1:
        raise UsageError(f"crop_scale={[low, high]} are shares of the image's area: 0 < low <= high <= 1")
    if not 0 <= flip <= 1:
        raise UsageError(f"flip={flip} is a probability; it must lie between 0 and 1")
    mean, std = stats(in_chans, mean, std)
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                tuple(image_size),
                scale=(low, high),
                ratio=(3 / 4, 4 / 3),
                interpolation=InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
