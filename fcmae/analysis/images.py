"""The images that an analysis looks at, as each subject takes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fcmae.analysis.subjects import Subject
from fcmae.data import open_source
from fcmae.data.decode import BrokenImage
from fcmae.data.sample import SamplePhotos
from fcmae.downstream.labelled import CentreCrops
from fcmae.errors import UsageError

MOST_SKIPPED = 1000


@dataclass(frozen=True)
class Images:
    """Centre crops of the same images for every subject.

    source: what names them. used: their names. skipped: `name: reason` of the unreadable. tensors: of each subject by
    its label (N, C, H, W) float32, normalized, on the CPU.
    """

    source: str
    used: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def say(self, count: int) -> list[str]:
        """What the user should know of them, in lines. count: as many were asked for."""
        lines = [f"skipped, unreadable: {line}" for line in self.skipped]
        if self.skipped:
            lines.append(f"{len(self.skipped)} images skipped, {len(self.used)} looked at")
        elif len(self.used) < count:
            lines.append(f"{len(self.used)} images looked at, all there are in {self.source}")
        return lines

    def about(self) -> dict:
        """For reports."""
        return {"source": self.source, "used": self.used, "skipped": self.skipped}


def read_images(source: str | None, subjects: list[Subject], count: int) -> Images:
    """So many images, or as many as there are, evenly spread over the source; each image once.

    source: as `data.source` of a run; None: that of the first subject that is a run. Raises UsageError where no source
    is known or none of its images can be read.
    """
    channels = {subject.in_chans for subject in subjects}
    if len(channels) > 1:
        raise UsageError(f"the subjects take images of {sorted(channels)} channels; look at them apart")
    source = source or next((s.run.data.source for s in subjects if s.run), None)
    if source is None:
        raise UsageError("no subject is a run, which would tell its images: give --images DIR, a list, or sample")
    opened = _opened(source, channels.pop())
    crops = {s.label: CentreCrops([], s.image_size, s.in_chans, list(s.mean), list(s.std)) for s in subjects}
    found, cut = Images(source), {label: [] for label in crops}
    for i in _order(opened, count):
        if len(found.used) == count or len(found.skipped) == MOST_SKIPPED:
            break
        try:
            image = opened.load(i)
        except BrokenImage as error:
            found.skipped.append(str(error))
            continue
        found.used.append(opened.name(i))
        for label, crop in crops.items():
            cut[label].append(crop.crop(image))
    if not found.used:
        raise UsageError(
            f"none of the {len(found.skipped)} images of {source} that were tried can be read, the first: "
            f"{found.skipped[0]}"
        )
    found.tensors.update({label: torch.stack(parts) for label, parts in cut.items()})
    return found


def _opened(source: str, channels: int):
    try:
        return open_source(source, channels)
    except UsageError as error:
        raise UsageError(str(error).replace("data.source=", "--images ")) from None


def _order(source, count: int) -> list[int]:
    """Numbers of images, `count` evenly apart first; then the others, for those of them that cannot be read. The sample
    tells few photographs apart by random crops, which are not made."""
    length = len(source.paths) if isinstance(source, SamplePhotos) else len(source)
    first = sorted(set(np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()))
    return [*first, *sorted(set(range(length)) - set(first))]
