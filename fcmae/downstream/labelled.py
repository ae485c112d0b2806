"""Labelled images in class folders or lists, and what is trained and validated on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.data.decode import BrokenImage, extensions, read_image
from fcmae.data.sources import walk
from fcmae.data.transforms import CROP, Surrounding, stats
from fcmae.errors import UsageError

LABEL_COLUMNS = ("label", "class")


@dataclass(frozen=True)
class Labelled:
    """Images (path, label) to train a classifier on and to validate it on; how they were divided, in words."""

    train: list[tuple[str, int]]
    val: list[tuple[str, int]]
    classes: list[str]
    split: str

    def describe(self) -> dict[str, object]:
        """Counts for the report; of the classes only the largest's share of the validation images."""
        labels = np.array([label for _, label in self.val])
        return {
            "train": len(self.train),
            "val": len(self.val),
            "classes": len(self.classes),
            "largest_class_share": float(np.bincount(labels).max() / len(labels)),
            "split": self.split,
        }


def open_labelled(root: str, in_chans: int, seed: int, val_share: float, most: int) -> Labelled:
    """The images of class folders, divided by their folders train/ and val/ or else, class by class, by the seed.

    Raises UsageError when there are no class folders with images, or fewer than two.
    """
    path = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(path):
        raise UsageError(f"data.labelled={root} is no folder; give one with a folder for each class")
    divided = all(os.path.isdir(os.path.join(path, part)) for part in ("train", "val"))
    parts = [by_class(os.path.join(path, part), in_chans) for part in (("train", "val") if divided else ("",))]
    classes = sorted(parts[0])
    if len(classes) < 2:
        found = f"only the class {classes[0]}" if classes else "no folder with images in it"
        raise UsageError(f"data.labelled={root} has {found}; it must hold a folder of images for each class")
    if divided:
        if unknown := sorted(set(parts[1]) - set(classes)):
            raise UsageError(f"data.labelled={root}: the class {unknown[0]} is in val/ and not in train/")
        train, val = ([(p, classes.index(c)) for c in classes for p in part.get(c, [])] for part in parts)
        split = "folders train/ and val/"
    else:
        train, val = [], []
        for label, name in enumerate(classes):
            order = np.random.default_rng([seed, label]).permutation(len(parts[0][name]))
            held = round(len(order) * val_share)
            val += [(parts[0][name][i], label) for i in sorted(order[:held])]
            train += [(parts[0][name][i], label) for i in sorted(order[held:])]
        split = f"{val_share:.0%} of every class, chosen by seed {seed}, to validate on"
    for part, what, change in ((val, "validate", "raise"), (train, "train", "lower")):
        if not part:
            raise UsageError(
                f"data.labelled={root} leaves no image to {what} on; give more, or {change} evaluate.val_share"
            )
    rng = np.random.default_rng([seed, len(classes)])
    train, val = (part if len(part) <= most else _some(rng, part, most) for part in (train, val))
    return Labelled(train, val, classes, split)


def by_class(root: str, in_chans: int) -> dict[str, list[str]]:
    """The images of each class folder, in one fixed order; folders without any are left out."""
    found: dict[str, list[str]] = {}
    for path in walk(root, extensions(in_chans)):
        name, _, rest = path.partition(os.sep)
        if rest:
            found.setdefault(name, []).append(os.path.join(root, path))
    return found


def _some(rng: np.random.Generator, part: list, most: int) -> list:
    return [part[i] for i in sorted(rng.permutation(len(part))[:most])]


class CentreCrops(Dataset):
    """Items (image (C, H, W) float32 normalized, label) of labelled files; an unreadable one has the label -1.

    See `crop` for how images are cut.
    """

    def __init__(
        self,
        files: list[tuple[str, int]],
        image_size: tuple[int, int],
        in_chans: int,
        mean: list[float] | None,
        std: list[float] | None,
        crop_pct: float = CROP,
        squash: bool = False,
        interpolation: str = "bicubic",
    ):
        self.files, self.image_size, self.in_chans = files, image_size, in_chans
        self.crop_pct, self.squash, self.interpolation = crop_pct, squash, interpolation
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in stats(in_chans, mean, std))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.files[i]
        try:
            image = read_image(path, self.in_chans)
        except BrokenImage:
            return torch.zeros(self.in_chans, *self.image_size), -1
        return self.crop(image), label

    def crop(self, image: Tensor) -> Tensor:
        """Scaled, aspect kept, until the share `crop_pct` of it covers the model's size; the centre cut out;
        normalized. squash: scaled to the model's size as it is, whatever its aspect."""
        from torchvision.transforms import v2
        from torchvision.transforms.v2 import functional as F

        if self.squash:
            image = F.resize(image, self.image_size, v2.InterpolationMode(self.interpolation), antialias=True)
        else:
            image = Surrounding(self.image_size, self.crop_pct, self.interpolation)(image)
        image = F.to_dtype(F.center_crop(image, list(self.image_size)), torch.float32, scale=True)
        return (image - self.mean) / self.std
