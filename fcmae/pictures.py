"""Pictures of a run: reconstructions and the loss curve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcmae.files import write_whole
from fcmae.kernels.tiles import Tiles
from fcmae.loss import spread, unpatchify, window_stats
from fcmae.train.rows import read_rows

TRUE_STATISTICS = "un-normalized with the true mean and std of each patch"


@torch.no_grad()
def reconstruct(model: torch.nn.Module, images: Tensor, mask: Tensor | Tiles) -> tuple[Tensor, Tensor]:
    """The masked image and the reconstruction with the visible regions pasted in, each (B, C, H, W) float32.

    images: (B, C, H, W) as the model takes them. mask: (B, gh, gw) bool, True = masked; hidden pixels of the masked
    image are NaN. With norm_pix the prediction is brought back to pixels by the true statistics of each window, which
    the model has not seen: say so wherever the picture is shown (`TRUE_STATISTICS`). Predicted principal components are
    brought back to pixels through their basis.
    """
    was_training = model.training
    model.eval()
    _, pred, mask = model(images, mask)
    model.train(was_training)
    size = tuple(images.shape[-2:])
    patches = pred.float() if model.target is None else model.target.restore(pred.float())
    filled = unpatchify(patches, model.patch_size, size)
    if model.norm_pix:
        window = model.norm_window or model.patch_size
        mean, std = (
            unpatchify(s.expand(-1, -1, window * window), window, size) for s in window_stats(images.float(), window)
        )
        filled = filled * std + mean
    hidden = spread(mask, size[0] // mask.shape[1])[:, None]
    return images.masked_fill(hidden, float("nan")).float(), torch.where(hidden, filled, images.float())


def reconstruction_sheet(
    path: Path, columns: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...], title: str
) -> None:
    """A PNG with one row an image and one named column a tensor (B, C, H, W), hidden (NaN) pixels grey.

    mean, std: the per-channel normalization to undo. One channel is shown grey, more than three by the first three.
    """
    figure, axes = empty_figure(nrows=len(next(iter(columns.values()))), ncols=len(columns), cell=2.2)
    for j, (name, batch) in enumerate(columns.items()):
        for i, image in enumerate(batch.cpu()):
            pixels = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
            pixels = torch.nan_to_num(pixels, nan=0.5).clamp(0, 1)
            pixels = pixels[:3] if pixels.shape[0] >= 3 else pixels[:1].expand(3, -1, -1)
            axes[i, j].imshow(pixels.permute(1, 2, 0).numpy())
            axes[i, j].set_axis_off()
        axes[0, j].set_title(name, fontsize=9)
    figure.suptitle(title, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))


def loss_curve(metrics: Path, path: Path, title: str) -> None:
    """A PNG of metrics.jsonl: the loss of each logged step, its running mean over 2 % of them, the learning rate."""
    rows = read_rows(metrics, "loss", "lr")
    steps = np.array([r["step"] for r in rows])
    loss = np.array([np.nan if r["loss"] is None else r["loss"] for r in rows])
    window = max(1, len(rows) // 50)
    figure, axes = empty_figure(nrows=1, ncols=1, cell=5.5)
    ax, rate = axes[0, 0], axes[0, 0].twinx()
    ax.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.8, label="loss")
    if window > 1:
        mean = np.convolve(loss, np.ones(window) / window, mode="valid")
        ax.plot(steps[window - 1 :], mean, color="tab:blue", label=f"mean of {window}")
    rate.plot(steps, [r["lr"] for r in rows], color="tab:orange", linewidth=0.8, label="learning rate")
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("loss on masked pixels")
    rate.set_ylabel("learning rate")
    ax.set_title(title, fontsize=9)
    ax.legend(*(a + b for a, b in zip(ax.get_legend_handles_labels(), rate.get_legend_handles_labels(), strict=True)))
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))


def empty_figure(nrows: int, ncols: int, cell: float):
    """A matplotlib figure and its axes (nrows, ncols), each `cell` inches wide."""
    # Figure itself rather than pyplot: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(cell * ncols * (1.35 if ncols == 1 else 1), cell * nrows + 0.4), layout="constrained")
    return figure, figure.subplots(nrows, ncols, squeeze=False)
