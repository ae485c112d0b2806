"""The pretraining loss of a trained model over mask ratios: the same images, and masks that grow."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from fcmae.analysis import style
from fcmae.analysis.cosine_distance import standard_error
from fcmae.analysis.gallery import masks_of
from fcmae.analysis.subjects import RANDOM, Subject
from fcmae.errors import UsageError
from fcmae.loss import masked_pixel_loss
from fcmae.masking import grid_size, keep_count
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.train.loop import tiles_of

RATIOS = tuple(i / 10 for i in range(1, 10))


@torch.no_grad()
def losses(model: MaskedAutoencoder, images: Tensor, mask: Tensor) -> list[float]:
    """The loss of each image (B, C, H, W) under its mask (B, gh, gw); their mean is the loss of the batch."""
    _, pred, mask = model(images, tiles_of(mask.cpu()).to(images.device))
    project = None if model.target is None else model.target.project
    settings = model.patch_size, model.norm_pix, model.norm_window, project
    each = zip(pred.split(1), images.split(1), mask.split(1), strict=True)
    return [masked_pixel_loss(*one, *settings).item() for one in each]


def refusal(subject: Subject) -> str | None:
    """Why it cannot be measured, if so."""
    if not subject.decoder:
        return "it has no decoder, so it has no pretraining loss; give a pretraining run"
    unfitted = subject.autoencoder.target is not None and subject.source.endswith(RANDOM)
    return "its target (loss.pca) is fitted when its run begins" if unfitted else None


def measure(subject: Subject, images: Tensor, settings) -> dict:
    """Mean and standard error over images (N, C, H, W) at each ratio that hides some regions and leaves some."""
    model, grid = subject.autoencoder, grid_size(subject.image_size, subject.autoencoder.mask_unit)
    regions = grid[0] * grid[1]
    trained = subject.run.mask.ratio if subject.run else None
    trained = model.mask_ratio if subject.run and trained is None else trained
    points, left_out = [], []
    for ratio in sorted({*RATIOS, *([trained] if trained else [])}):
        try:
            hidden = regions - keep_count(regions, ratio)
        except UsageError:
            left_out.append(ratio)
            continue
        masks = masks_of(grid, len(images), "random", ratio, settings.seed)
        parts = zip(subject.batches(images, settings.batch_size), masks.split(settings.batch_size), strict=True)
        found = [loss for part, mask in parts for loss in losses(model, part, mask)]
        points.append(
            {
                "ratio": ratio,
                "hidden": hidden,
                "loss": statistics.fmean(found),
                "standard_error": standard_error(found),
            }
        )
    return {
        "mask_unit": model.mask_unit,
        "regions": regions,
        "trained_at": trained,
        "norm_pix": model.norm_pix,
        "norm_window": model.norm_window or model.patch_size,
        "points": points,
        "left_out": left_out,
    }


def draw(results: dict[str, dict]):
    """One curve for each subject; the ratio that it was trained at as a ring."""
    figure = style.figure(6.4, 4.0)
    ax = figure.subplots()
    for (name, found), colour in zip(results.items(), style.colours(results), strict=True):
        x, y, error = ([point[key] for point in found["points"]] for key in ("ratio", "loss", "standard_error"))
        ax.errorbar(x, y, error, fmt="-o", color=colour, linewidth=1.4, markersize=3.5, elinewidth=0.8, label=name)
        if found["trained_at"] in x:
            ax.plot(found["trained_at"], y[x.index(found["trained_at"])], "o", mfc="none", mec=colour, markersize=9)
    ax.set_xlabel("mask ratio (ring: the one it was trained at; bars: standard error over images)")
    ax.set_ylabel("loss on masked pixels")
    style.legend(figure, results)
    return style.plain(figure)


def say(name: str, found: dict) -> str:
    """What came out, in a line."""
    first, last = found["points"][0], found["points"][-1]
    said = f"loss {first['loss']:.4f} at ratio {first['ratio']}, {last['loss']:.4f} at {last['ratio']}"
    if found["left_out"]:
        said += (
            f"; left out, hiding none or all of {found['regions']} regions: {', '.join(map(str, found['left_out']))}"
        )
    return said
