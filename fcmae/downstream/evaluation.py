"""How well a classifier does on labelled images: exact counts over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from fcmae.downstream.labelled import CentreCrops, Labelled
from fcmae.downstream.representation import loader
from fcmae.downstream.settings import DownstreamConfig, crop_pct, image_size
from fcmae.errors import UsageError
from fcmae.train.distributed import World
from fcmae.train.optim import autocast

MOST_CLASSES = 2000  # of which every pair is counted: 22,000 would take gigabytes


def centre_crops(config: DownstreamConfig, files: list[tuple[str, int]]) -> CentreCrops:
    """Labelled files as validation sees them."""
    data, size = config.data, image_size(config)
    return CentreCrops(
        files, size, config.model.in_chans, data.mean, data.std, crop_pct(config, size), data.crop_mode == "squash",
        data.interpolation,
    )  # fmt: skip


def batches(config: DownstreamConfig, files: list[tuple[str, int]], world: World, workers: int):
    """This rank's share of the files, in their order; each is on one rank alone."""
    crops, count = centre_crops(config, files), len(files)
    share = range(count * world.rank // world.size, count * (world.rank + 1) // world.size)
    return loader(Subset(crops, share), config.eval.batch_size, workers)


@dataclass
class Tally:
    """Counts over validation images: of each class (C,) how many there are and how many are right; `table` (C, C), the
    images of each true (row) and predicted class (column), None for more than MOST_CLASSES; and sums over images."""

    totals: Tensor
    right: Tensor
    table: Tensor | None
    loss: float = 0.0
    top5: int = 0
    unreadable: int = 0

    @classmethod
    def empty(cls, classes: int) -> Tally:
        """Of so many classes, nothing counted."""
        zeros = [torch.zeros(classes, dtype=torch.int64) for _ in range(2)]
        return cls(*zeros, torch.zeros(classes, classes, dtype=torch.int64) if classes <= MOST_CLASSES else None)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count images with logits (B, C) and labels (B,), both on the CPU."""
        predicted, ones = logits.argmax(1), torch.ones_like(labels)
        self.totals.index_add_(0, labels, ones)
        self.right.index_add_(0, labels, (predicted == labels).long())
        if self.table is not None:
            self.table.index_put_((labels, predicted), ones, accumulate=True)
        self.loss += F.cross_entropy(logits.double(), labels, reduction="sum").item()
        self.top5 += int((logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).sum())

    def over(self, world: World) -> Tally:
        """The tally of all ranks."""
        if world.size == 1:
            return self
        counts = [world.sum(x.to(world.device)).cpu() for x in (self.totals, self.right)]
        table = None if self.table is None else world.sum(self.table.to(world.device)).cpu()
        sums = torch.tensor([self.loss, self.top5, self.unreadable], dtype=torch.float64, device=world.device)
        loss, top5, unreadable = world.sum(sums).tolist()
        return Tally(*counts, table, loss, int(top5), int(unreadable))

    def per_class(self) -> list[float | None]:
        """Of each class the share of its images that is right; None without any."""
        pairs = zip(self.right.tolist(), self.totals.tolist(), strict=True)
        return [right / total if total else None for right, total in pairs]

    def scores(self) -> dict[str, float | None]:
        """Top-1, its standard error, top-5, the mean over classes of each one's share that is right, the mean loss
        (None where it is not finite).

        Raises UsageError when no image could be read.
        """
        count = int(self.totals.sum())
        if not count:
            raise UsageError("no image of data.val could be read")
        seen = [share for share in self.per_class() if share is not None]
        top1 = int(self.right.sum()) / count
        return {
            "top1": top1,
            "standard_error": (top1 * (1 - top1) / count) ** 0.5,
            "top5": self.top5 / count,
            "balanced": sum(seen) / len(seen),
            "loss": self.loss / count if math.isfinite(self.loss) else None,
            "images": count,
            "unreadable": self.unreadable,
        }


@torch.no_grad()
def validate(
    model: nn.Module, config: DownstreamConfig, labelled: Labelled, world: World, workers: int
) -> tuple[Tally, dict[str, float]]:
    """The counts over all ranks and their scores of a classifier on the validation images; it is left in eval mode.

    Unreadable images are counted and left out.
    """
    model.eval()
    tally = Tally.empty(len(labelled.classes))
    for images, labels in batches(config, labelled.val, world, workers):
        read = labels >= 0
        tally.unreadable += int((~read).sum())
        if read.any():
            with autocast(world.device, config.train.precision):
                logits = model(images[read].to(world.device))
            tally.add(logits.float().cpu(), labels[read])
    tally = tally.over(world)
    return tally, tally.scores()
