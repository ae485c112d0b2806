"""The figures of one arm: its curve and pace as they were logged, FLOPs, parameters, and the machine."""

from __future__ import annotations

import copy
import datetime
import math
import os
import platform
import statistics
from pathlib import Path

import numpy as np
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import fcmae
from fcmae.kernels.devices import active
from fcmae.masking import draw_mask, grid_size
from fcmae.models import settings_of
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.pretrain import build_model
from fcmae.schema import Config
from fcmae.train.loop import tiles_of
from fcmae.train.rows import read_rows
from fcmae.train.run_folder import RunFolder

POINTS = 2000  # at most so many of a curve are kept in the report


def read_curve(folder: RunFolder) -> dict[str, list]:
    """Columns of a run's logged steps whose loss was finite: step, seconds of training so far, step_seconds, waited,
    loss, and smooth, the mean of the last 2 % of the losses up to each."""
    keys = ("seconds", "step_seconds", "waited")
    times = {row["step"]: row for row in read_rows(folder.times, *keys)}
    rows = [row for row in read_rows(folder.metrics, "loss") if row["loss"] is not None and row["step"] in times]
    curve = {"step": [row["step"] for row in rows], "loss": [row["loss"] for row in rows]}
    for key in keys:
        curve[key] = [times[step][key] for step in curve["step"]]
    return curve | {"smooth": running_mean(curve["loss"], window(len(rows)))}


def window(points: int) -> int:
    """Points over which a loss is averaged: 2 % of them."""
    return max(1, points // 50)


def running_mean(values: list[float], size: int) -> list[float]:
    """The mean of the last `size` values up to each, of fewer at the beginning."""
    return [statistics.fmean(values[max(0, i + 1 - size) : i + 1]) for i in range(len(values))]


def thinned(curve: dict[str, list], most: int = POINTS) -> dict[str, list]:
    """Every n-th point of a curve, the last included, so that there are at most `most`."""
    stride = math.ceil(len(curve["step"]) / most)
    return {key: values[::-1][::stride][::-1] for key, values in curve.items()}


def time_to(curve: dict[str, list], loss: float) -> dict[str, float | int] | None:
    """The first step at which the averaged loss is no more than `loss`, and the seconds of training until then."""
    for step, seconds, smooth in zip(curve["step"], curve["seconds"], curve["smooth"], strict=True):
        if smooth <= loss:
            return {"step": step, "seconds": seconds}
    return None


def pace(curve: dict[str, list], images_per_step: int) -> dict[str, float]:
    """Images per second by the median step, and the share of all steps' time that was spent waiting for images."""
    median = statistics.median(curve["step_seconds"])
    return {
        "images_per_second": images_per_step / median,
        "median_step_seconds": median,
        "data_wait_share": sum(curve["waited"]) / sum(curve["step_seconds"]),
    }


def flops(config: Config) -> dict[str, int]:
    """Floating-point operations of one image's forward pass, two for each multiply-add: of the encoder on the visible
    regions, of the whole (encoder, decoder, loss), and of the encoder on every region.

    Counted on PyTorch's own formulation: matrix products, convolutions and attention; a 7x7 convolution on visible
    tiles as 49 taps for each visible position and channel. Norms, activations and sums over pixels are not counted.
    """
    config = copy.deepcopy(config)
    if "backend" in settings_of(config.model.name):
        config.sparse.backend = "reference"
    model = build_model(config).eval()  # a single image has no batch statistics
    images = torch.zeros(1, model.in_chans, *model.image_size)
    grid = grid_size(model.image_size, model.mask_unit)
    mask = torch.from_numpy(draw_mask(np.random.default_rng(0), grid, model.mask_ratio, config.mask.strategy))
    tiles = tiles_of(mask[None])
    passes = {
        "encoder": lambda: model.encode(images, tiles),
        "whole": lambda: model(images, tiles),
        "encoder_dense": lambda: model.encode(images),
    }
    return {name: _count(run) for name, run in passes.items()}


@torch.no_grad()
def _count(run) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.fcmae.tile_conv: _tile_conv_flops}) as counter:
        run()
    return counter.get_total_flops()


def _tile_conv_flops(x: torch.Size, weight: torch.Size, *_, **__) -> int:
    return 2 * math.prod(x) * math.prod(weight[1:])


def parameters(model: MaskedAutoencoder) -> dict[str, int]:
    """How many of the encoder, and of all."""
    return {
        "encoder": sum(p.numel() for p in model.encoder_parameters()),
        "whole": sum(p.numel() for p in model.parameters()),
    }


def machine(device: torch.device) -> dict[str, object]:
    """What the figures depend on besides the settings."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": active(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "fcmae": fcmae.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
