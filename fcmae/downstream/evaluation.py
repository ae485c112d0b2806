"""How well a classifier does on labelled images: exact counts over all ranks."""

from __future__ import annotations

from collections.abc import Callable

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


@torch.no_grad()
def confusion(
    model: Callable[[Tensor], Tensor], batches, classes: int, world: World, precision: str
) -> tuple[Tensor, dict[str, float]]:
    """The images of each true (row) and predicted class (column), (C, C) int64, and sums over all images and ranks.

    model: images (B, C, H, W) to logits (B, classes), in evaluation mode. Unreadable images are counted and left out.
    """
    table = torch.zeros(classes * classes, dtype=torch.int64)
    sums = torch.zeros(3, dtype=torch.float64)  # loss, right among the first five, unreadable
    for images, labels in batches:
        read = labels >= 0
        sums[2] += int((~read).sum())
        if not read.any():
            continue
        labels = labels[read]
        with autocast(world.device, precision):
            logits = model(images[read].to(world.device))
        logits = logits.float().cpu()
        table += torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
        best = logits.topk(min(5, classes), dim=1).indices
        sums[0] += F.cross_entropy(logits.double(), labels, reduction="sum")
        sums[1] += int((best == labels[:, None]).sum())
    table, sums = world.sum(table.to(world.device)).cpu(), _sum_doubles(world, sums)
    return table.view(classes, classes), dict(zip(("loss", "top5", "unreadable"), sums.tolist(), strict=True))


def scores(table: Tensor, sums: dict[str, float]) -> dict[str, float]:
    """Top-1, its standard error, top-5, the mean over classes of each one's share that is right, and the mean loss."""
    count = int(table.sum())
    if not count:
        raise UsageError("no image of data.val could be read")
    each = per_class(table)
    seen = [share for share in each if share is not None]
    top1 = table.diag().sum().item() / count
    return {
        "top1": top1,
        "standard_error": (top1 * (1 - top1) / count) ** 0.5,
        "top5": sums["top5"] / count,
        "balanced": sum(seen) / len(seen),
        "loss": sums["loss"] / count,
        "images": count,
        "unreadable": int(sums["unreadable"]),
    }


def per_class(table: Tensor) -> list[float | None]:
    """Of each class the share of its images that is right; None without any."""
    totals = table.sum(1).tolist()
    return [right / total if total else None for right, total in zip(table.diag().tolist(), totals, strict=True)]


def validate(
    model: nn.Module, config: DownstreamConfig, labelled: Labelled, world: World, workers: int
) -> tuple[Tensor, dict[str, float]]:
    """The confusion table and `scores` of a classifier on the validation images; the model is left in eval mode."""
    model.eval()
    shares = batches(config, labelled.val, world, workers)
    table, sums = confusion(model, shares, len(labelled.classes), world, config.train.precision)
    return table, scores(table, sums)


def _sum_doubles(world: World, sums: Tensor) -> Tensor:
    if world.device.type == "mps":  # which has no float64
        return sums
    return world.sum(sums.to(world.device)).cpu()
