"""Values that no run can work with, found before anything starts."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fcmae import config as settings
from fcmae.data.transforms import CROPS, JITTERED
from fcmae.errors import UsageError
from fcmae.masking import STRATEGIES
from fcmae.minkowski import engine
from fcmae.models.norms import NORMS
from fcmae.models.support import MINKOWSKI
from fcmae.schema import Config
from fcmae.train import family
from fcmae.train.optim import PRECISIONS
from fcmae.train.run_config import RunConfig


def check(config: Config) -> None:
    """Raises UsageError, naming the setting and what it may be, for the first value out of range."""
    data, log = config.data, config.log
    rules = [
        (config.out, "out", "the run folder, e.g. out=runs/atto"),
        (data.source, "data.source", "where images are, e.g. data.source=/data/imagenet/train or data.source=sample"),
        (config.init is None or config.resume is None, "init", "null where resume is set, which brings its weights"),
        (0 <= config.seed < 2**64, "seed", "0 or more, and less than 2 ** 64"),
        (config.model.in_chans >= 1, "model.in_chans", "1 or more"),
        (config.model.decoder_dim is None or config.model.decoder_dim >= 1, "model.decoder_dim", "1 or more, or null"),
        (
            config.model.decoder_depth is None or config.model.decoder_depth >= 0,
            "model.decoder_depth", "0 or more, or null",
        ),
        (config.model.norm in NORMS, "model.norm", f"one of {', '.join(NORMS)}"),
        (config.mask.strategy in STRATEGIES, "mask.strategy", f"one of {', '.join(STRATEGIES)}"),
        (config.loss.norm_window is None or config.loss.norm_window >= 1, "loss.norm_window", "1 or more, or null"),
        (config.loss.pca is None or config.loss.pca >= 1, "loss.pca", "1 or more, or null"),
        (data.crop in CROPS, "data.crop", f"one of {', '.join(CROPS)}"),
        (0 <= data.color_jitter <= 1, "data.color_jitter", "between 0 and 1"),
        (
            data.color_jitter == 0 or config.model.in_chans in JITTERED,
            "data.color_jitter", f"0 for model.in_chans={config.model.in_chans}: colours are of 1 or 3 channels",
        ),
        *rules_of_training(config),
        (log.images >= 0, "log.images", "0 or more"),
        (log.images_every > 0, "log.images_every", "more than 0"),
        (log.collapse_every >= 0, "log.collapse_every", "0 or more"),
    ]  # fmt: skip
    hold(config, rules)
    family.check(config)


def rules_of_training(config: RunConfig) -> list[tuple]:
    """What holds of every training run, whatever it trains: (holds, setting, what it must be)."""
    train, data, log = config.train, config.data, config.log
    return [
        (train.sharding in ("none", "full"), "train.sharding", "none or full"),
        (
            train.sharding == "none" or train.precision != "fp16",
            "train.precision", "bf16 or fp32 where train.sharding=full: the scaler of fp16 sees one rank's part",
        ),
        (train.precision in PRECISIONS, "train.precision", f"one of {', '.join(PRECISIONS)}"),
        (train.epochs > 0, "train.epochs", "more than 0"),
        (train.steps is None or train.steps >= 1, "train.steps", "1 or more, or null"),
        (train.seconds is None or train.seconds > 0, "train.seconds", "more than 0, or null"),
        (train.seconds is None or train.steps is None, "train.seconds", "null where train.steps is set"),
        (train.batch_size >= 1, "train.batch_size", "1 or more"),
        (train.accum_steps >= 1, "train.accum_steps", "1 or more"),
        (train.effective_batch is None or train.effective_batch >= 1, "train.effective_batch", "1 or more, or null"),
        (train.base_lr >= 0, "train.base_lr", "0 or more"),
        (train.lr is None or train.lr >= 0, "train.lr", "0 or more, or null"),
        (train.min_lr >= 0, "train.min_lr", "0 or more"),
        (train.warmup_epochs >= 0, "train.warmup_epochs", "0 or more"),
        (train.weight_decay >= 0, "train.weight_decay", "0 or more"),
        (len(train.betas) == 2 and all(0 <= b < 1 for b in train.betas), "train.betas", "two numbers in [0, 1)"),
        (train.clip_grad is None or train.clip_grad > 0, "train.clip_grad", "more than 0, or null"),
        (train.max_nonfinite >= 1, "train.max_nonfinite", "1 or more"),
        (train.spike_factor is None or train.spike_factor > 1, "train.spike_factor", "more than 1, or null"),
        (data.workers >= -1, "data.workers", "-1 or more"),
        (data.prefetch >= 1, "data.prefetch", "1 or more"),
        (
            len(data.crop_scale) == 2 and 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1,
            "data.crop_scale", "two numbers, 0 < least <= most <= 1",
        ),
        (0 <= data.flip <= 1, "data.flip", "between 0 and 1"),
        (0 <= data.max_bad_share <= 1, "data.max_bad_share", "between 0 and 1"),
        (config.checkpoint.every >= 1, "checkpoint.every", "1 or more"),
        (config.checkpoint.keep_last >= 1, "checkpoint.keep_last", "1 or more"),
        (
            config.checkpoint.keep_every is None or config.checkpoint.keep_every >= 1,
            "checkpoint.keep_every", "1 or more, or null",
        ),
        (log.every >= 1, "log.every", "1 or more"),
        (log.print_every >= 1, "log.print_every", "1 or more"),
    ]  # fmt: skip


def hold(config: RunConfig, rules: list[tuple]) -> None:
    """Raises UsageError for the first number that is not finite, or the first rule that does not hold."""
    for key in settings.describe(type(config)):
        values = _value(config, key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{key}={value} will not do: it must be a finite number")
    for holds, key, wanted in rules:
        if not holds:
            value = _value(config, key)
            raise UsageError(f"{key}={'null' if value is None else value} will not do: it must be {wanted}")


def check_backend(config: Config, device: torch.device) -> None:
    """Raises UsageError when `sparse.backend` is not installed, or lacks the device or the precision asked for."""
    if config.sparse.backend != MINKOWSKI:
        return
    if config.train.sharding != "none":
        raise UsageError("train.sharding=full: MinkowskiEngine's modules cannot be spread; use another backend")
    engine.load()
    engine.check_device(device)
    engine.check_dtype(PRECISIONS[config.train.precision] or torch.float32)
    if config.train.compile:
        raise UsageError("train.compile=true: MinkowskiEngine cannot be compiled; turn it off or use another backend")


def _value(config: RunConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)
