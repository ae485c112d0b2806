"""What training does to labelled images, at random: single ones in the loader, whole batches on the device."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.data.transforms import make_transform, stats
from fcmae.downstream.settings import DownstreamConfig, image_size


def training_transform(config: DownstreamConfig) -> Callable[[Tensor], Tensor]:
    """Decoded images (C, H, W) to (C, *image_size) float32: crop, flip, timm's RandAugment, normalize, random erasing.

    Randomness: the global generators of torch's CPU, numpy and Python.
    """
    from timm.data.random_erasing import RandomErasing
    from torchvision.transforms import v2

    data, channels = config.data, config.model.in_chans
    size = image_size(config)
    pipeline = make_transform(size, channels, tuple(data.crop_scale), data.flip, data.mean, data.std)
    steps = list(pipeline.transforms)
    steps[0].interpolation = v2.InterpolationMode(data.interpolation)
    if data.randaugment:
        mean, _ = stats(channels, data.mean, data.std)
        steps.insert(2, _RandAugment(data.randaugment, size, mean, data.interpolation))
    if data.random_erasing:
        steps.append(RandomErasing(data.random_erasing, mode="pixel", device="cpu"))
    return v2.Compose(steps)


class _RandAugment:
    """timm's RandAugment, which takes Pillow's images, on tensors (3, H, W)."""

    def __init__(self, words: str, size: tuple[int, int], mean: tuple[float, ...], interpolation: str):
        from timm.data.auto_augment import rand_augment_transform
        from timm.data.transforms import str_to_pil_interp

        fill = tuple(min(255, round(255 * x)) for x in mean)
        given = {"translate_const": int(min(size) * 0.45), "img_mean": fill}
        self.augment = rand_augment_transform(words, given | {"interpolation": str_to_pil_interp(interpolation)})
        for op in self.augment.ops:
            if op.name.startswith("Posterize"):
                op.aug_fn = partial(_posterize, op.aug_fn)

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional as F

        if image.is_floating_point():  # a bicubic crop overshoots, and 8 bits wrap around
            image = image.clamp(0, 1)
        image = F.to_dtype(image, torch.uint8, scale=True)
        return F.pil_to_tensor(self.augment(F.to_pil_image(image)))


def _posterize(posterize: Callable, image, bits: int, **arguments):
    """timm's, and black for the 0 bits that its strongest level keeps, which Pillow 13 refuses."""
    from PIL import Image

    return posterize(image, bits, **arguments) if bits else Image.new(image.mode, image.size)


def objective(config: DownstreamConfig, classes: int) -> Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]:
    """The training loss of (forward, images, labels): cross entropy, of mixed images and smoothed labels as configured.

    Mixing draws from numpy's global generator.
    """
    data, smoothing = config.data, config.train.label_smoothing
    if not (data.mixup or data.cutmix):

        def plain(forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(forward(images).float(), labels, label_smoothing=smoothing)

        return plain
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy

    mix = Mixup(data.mixup, data.cutmix, None, data.mixup_prob, data.mixup_switch_prob,
                label_smoothing=smoothing, num_classes=classes)  # fmt: skip
    soft = SoftTargetCrossEntropy()

    def mixed(forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        images, targets = mix(images, labels)
        return soft(forward(images).float(), targets)

    return mixed


def seed_step(seed: int, step: int, rank: int) -> None:
    """Drop path, dropout and mixing follow from (seed, step, rank), so that a resumed run repeats them."""
    number = int(np.random.SeedSequence([seed, 1, step, rank]).generate_state(1, np.uint64)[0])
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)
