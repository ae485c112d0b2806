"""What a run on labelled images leaves: classifiers that timm loads, pictures, results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from fcmae.checksum import write_safetensors
from fcmae.data.transforms import stats
from fcmae.downstream.batch_norm import plain
from fcmae.downstream.evaluation import Tally
from fcmae.downstream.settings import DownstreamConfig, crop_pct, image_size
from fcmae.downstream.start import Start
from fcmae.errors import UsageError
from fcmae.files import write_whole
from fcmae.models.layers import LAYER_SCALE
from fcmae.pictures import empty_figure
from fcmae.train.rows import read_rows
from fcmae.weights import load_tensors

FORMAT = "fcmae-classifier-1"
MOST_DRAWN = 1000  # classes of a confusion matrix


def write_json(path: Path, found: dict) -> None:
    """Plain data as a file that is whole or not there."""
    write_whole(path, lambda file: file.write((json.dumps(found, indent=1, allow_nan=False) + "\n").encode()))


def damage(path: Path) -> str | None:
    """What is wrong with a written classifier; None if it is whole."""
    try:
        load_tensors(path)
        json.loads(path.with_suffix(".json").read_text())
    except UsageError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{path.with_suffix('.json')} is not readable: {error}"
    return None


def write_classifier(
    path: Path, model: nn.Module, start: Start, config: DownstreamConfig, classes: list[str], found: dict
) -> None:
    """Write a model as timm's `checkpoint_path` takes it, and beside it, as .json, what else its user needs.

    A probe's BatchNorm before the classifier, which has no affine part, becomes part of the classifier. found: how
    the model did.
    """
    size, data = image_size(config), config.data
    mean, std = stats(config.model.in_chans, data.mean, data.std)
    arguments: dict = {"num_classes": len(classes)}
    if config.model.in_chans != 3:
        arguments["in_chans"] = config.model.in_chans
    if start.is_vit:
        heads = start.spec.running_heads
        arguments |= {"img_size": list(size), "global_pool": config.model.pool, "num_heads": heads}
    elif start.spec.block_norm == "none":
        arguments |= {"use_grn": False, "ls_init_value": LAYER_SCALE}
    about = {
        "format": FORMAT,
        "model": start.spec.name,
        "timm": arguments,
        "image_size": list(size),
        "mean": list(mean),
        "std": list(std),
        "crop_pct": crop_pct(config, size),
        "crop_mode": data.crop_mode,
        "interpolation": data.interpolation,
        "classes": classes,
        "val": found,
    }
    state = {key: x.detach().cpu().contiguous() for key, x in plain(model).items()}
    write_safetensors(path, state)
    write_json(path.with_suffix(".json"), about)


def write_tables(folder: Path, tally: Tally, classes: list[str], found: dict, prefix: str = "") -> None:
    """per_class.json and confusion.png, behind a prefix, of the validation with the results `found`."""
    rows = {
        name: {"images": total, "accuracy": share}
        for name, total, share in zip(classes, tally.totals.tolist(), tally.per_class(), strict=True)
    }
    write_json(folder / f"{prefix}per_class.json", {"of": found, "classes": rows})
    if tally.table is not None and len(classes) <= MOST_DRAWN:
        draw_confusion(folder / f"{prefix}confusion.png", tally.table, classes, f"top-1 {100 * found['top1']:.2f} %")


def draw_confusion(path: Path, table: Tensor, classes: list[str], title: str) -> None:
    """A PNG: of each true class (row) the share that was taken for each class (column)."""
    shares = (table / table.sum(1, keepdim=True).clamp_min(1)).numpy()
    few = len(classes) <= 40
    figure, axes = empty_figure(1, 1, max(4.0, 0.3 * len(classes)) if few else 9.0)
    ax = axes[0, 0]
    figure.colorbar(ax.imshow(shares, vmin=0, vmax=1, cmap="Blues"), ax=ax, shrink=0.8)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    if few:
        ax.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        ax.set_yticks(range(len(classes)), classes, fontsize=7)
    ax.set_title(title, fontsize=9)
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))


def draw_curve(folder: Path, title: str) -> None:
    """curve.png: training loss of each step; top-1 of each validation, of the model and of its average."""
    rows = read_rows(folder / "metrics.jsonl", "epoch", "loss")
    checked = read_rows(folder / "validation.jsonl", "epoch", "model")
    figure, axes = empty_figure(1, 1, 5.5)
    ax, right = axes[0, 0], axes[0, 0].twinx()
    loss = np.array([np.nan if r["loss"] is None else r["loss"] for r in rows])
    ax.plot([r["epoch"] for r in rows], loss, color="tab:blue", alpha=0.5, linewidth=0.8, label="training loss")
    for name, colour in (("model", "tab:orange"), ("ema", "tab:green")):
        if found := [(r["epoch"], 100 * r[name]["top1"]) for r in checked if r.get(name)]:
            right.plot(*zip(*found, strict=True), color=colour, marker=".", label=f"top-1, {name}")
    ax.set_xlabel("epoch")
    ax.set_ylabel("training loss")
    right.set_ylabel("top-1 on data.val, %")
    ax.set_title(title, fontsize=9)
    ax.legend(*(a + b for a, b in zip(ax.get_legend_handles_labels(), right.get_legend_handles_labels(), strict=True)))
    write_whole(folder / "curve.png", lambda file: figure.savefig(file, dpi=110, format="png"))
