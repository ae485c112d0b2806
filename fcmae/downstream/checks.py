"""Values that no run on labelled images can work with, found before anything starts."""

from __future__ import annotations

import re

from fcmae.downstream.settings import DownstreamConfig, ProbeConfig
from fcmae.errors import UsageError
from fcmae.train import checks

MODES = ("linear", "partial", "knn")
_RANDAUGMENT = re.compile(r"rand(-(m\d+|n\d+|p\d+(\.\d+)?|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t\w+))*")


def check(config: DownstreamConfig, training: bool = True) -> None:
    """Raises UsageError, naming the setting and what it may be, for the first value out of range.

    training: False where only data.val is used.
    """
    model, data, train = config.model, config.data, config.train
    mixes = data.mixup > 0 or data.cutmix > 0
    rules = [
        (config.out or not training, "out", "the run folder, e.g. out=runs/finetune"),
        (data.train or not training, "data.train", "class folders to train on, e.g. data.train=/data/imagenet/train"),
        (data.val, "data.val", "class folders to validate on, e.g. data.val=/data/imagenet/val"),
        (
            config.init or config.resume or model.name,
            "model.name", "set where init is not, e.g. model.name=convnextv2_atto",
        ),
        (0 <= config.seed < 2**64, "seed", "0 or more, and less than 2 ** 64"),
        (model.in_chans >= 1, "model.in_chans", "1 or more"),
        (model.classes is None or model.classes >= 2, "model.classes", "2 or more, or null"),
        (model.pool in ("avg", "token"), "model.pool", "avg or token"),
        (0 <= model.drop_path < 1, "model.drop_path", "in [0, 1)"),
        (model.head_init_scale >= 0, "model.head_init_scale", "0 or more"),
        (0 < data.fraction <= 1, "data.fraction", "more than 0 and at most 1"),
        (data.randaugment is None or _RANDAUGMENT.fullmatch(data.randaugment), "data.randaugment",
         "null or timm's words such as rand-m9-mstd0.5-inc1"),
        (data.randaugment is None or model.in_chans == 3, "data.randaugment", "null for other than 3 channels"),
        (0 <= data.random_erasing <= 1, "data.random_erasing", "between 0 and 1"),
        (data.mixup >= 0, "data.mixup", "0 or more"),
        (data.cutmix >= 0, "data.cutmix", "0 or more"),
        (0 <= data.mixup_prob <= 1, "data.mixup_prob", "between 0 and 1"),
        (0 <= data.mixup_switch_prob <= 1, "data.mixup_switch_prob", "between 0 and 1"),
        (not mixes or train.batch_size % 2 == 0, "train.batch_size", "even where mixup or cutmix mix it"),
        (data.crop_pct is None or 0 < data.crop_pct <= 1, "data.crop_pct", "in (0, 1], or null"),
        (data.crop_mode in ("center", "squash"), "data.crop_mode", "center or squash"),
        (data.interpolation in ("bicubic", "bilinear"), "data.interpolation", "bicubic or bilinear"),
        (train.optimizer in ("adamw", "lars"), "train.optimizer", "adamw or lars"),
        (train.layer_decay is None or 0 < train.layer_decay <= 1, "train.layer_decay", "in (0, 1], or null"),
        (train.layer_decay_scheme in (None, "block", "group"), "train.layer_decay_scheme", "block, group or null"),
        (0 <= train.label_smoothing < 1, "train.label_smoothing", "in [0, 1)"),
        (train.sharding == "none", "train.sharding", "none: a classifier is whole on every rank"),
        (train.spike_factor is None, "train.spike_factor", "null: pretraining alone goes back"),
        (0 <= config.ema.decay < 1, "ema.decay", "in [0, 1)"),
        (config.eval.every > 0, "eval.every", "more than 0"),
        (config.eval.batch_size >= 1, "eval.batch_size", "1 or more"),
        *checks.rules_of_training(config),
    ]  # fmt: skip
    if isinstance(config, ProbeConfig):
        p = config.probe
        rules += [
            (p.mode in MODES, "probe.mode", ", ".join(MODES)),
            (p.blocks and all(b == 0.5 or b >= 0 and b == int(b) for b in p.blocks), "probe.blocks",
             "whole numbers of blocks, or 0.5 for the last one's MLP"),
            (len(set(p.blocks)) == len(p.blocks), "probe.blocks", "each number once"),
            (p.neighbours and min(p.neighbours, default=0) >= 1, "probe.neighbours", "numbers of 1 or more"),
            (not p.batch_norm or p.mode == "knn" or train.batch_size >= 2, "train.batch_size",
             "2 or more: BatchNorm needs more than one image"),
            (p.temperature > 0, "probe.temperature", "more than 0"),
            (p.decay >= 0, "probe.decay", "0 or more"),
        ]  # fmt: skip
    checks.hold(config, rules)
    if data.train and data.val and data.train == data.val and training:
        raise UsageError(f"data.train and data.val are both {data.val}; images that were trained on tell nothing")
