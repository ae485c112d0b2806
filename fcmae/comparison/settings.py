"""The configuration of a comparison: what all arms share, each arm's own settings, and what would make it unfair."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any

from fcmae import config as settings
from fcmae.errors import UsageError
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    SparseConfig,
    TrainConfig,
    setting,
)
from fcmae.train import checks, family
from fcmae.train.schedule import Schedule

_BUDGET = "the budget says how long: budget.steps or budget.seconds"
_SAME = "it must be the same for all arms, or they would not be comparable; set it outside of arms"
_FOLDER = "each arm is the run out/arms/NAME, which goes on by itself"


@dataclass
class SharedMask(MaskConfig):
    ratio: float | None = setting(0.6, "share of regions hidden, int(L * (1 - ratio)) of L stay")
    unit: int | None = setting(32, "side of a region in pixels, a multiple of every arm's patch; FCMAE has 32")


@dataclass
class SharedLoss(LossConfig):
    norm_window: int | None = setting(32, "window side in pixels, so that every arm is measured by the same numbers")


@dataclass
class ComparedData(DataConfig):
    labelled: str | None = setting(None, "class folders, or train/ and val/ of them, for kNN and probe; null: neither")


@dataclass
class BudgetConfig:
    steps: int | None = setting(None, "optimizer steps of every arm")
    seconds: float | None = setting(
        None, "training time of every arm in seconds, compiling included; checkpoints and pictures not counted"
    )


@dataclass
class EvaluateConfig:
    images: int = setting(6, "images reconstructed side by side")
    distance_images: int = setting(64, "images over which the cosine distance of channels is averaged")
    neighbours: int = setting(20, "kNN: nearest training images that vote")
    temperature: float = setting(0.07, "kNN: a vote weighs exp(cosine / temperature)")
    decay: float = setting(1e-3, "probe: weight decay, loss + decay / 2 * |W|^2 on standardized features")
    val_share: float = setting(0.2, "of every class to validate on, where data.labelled has no val/")
    labelled_images: int = setting(50_000, "labelled images used at most of either split, a seeded choice")
    batch_size: int = setting(64, "images per forward pass")


@dataclass
class CompareConfig:
    """Everything `python -m fcmae.compare` can be told. --arms-in-turn is short for arms_in_turn=true."""

    out: str | None = setting(None, "folder of the comparison; one that stopped there goes on")
    seed: int = setting(0, "of the initial weights, crops, flips, masks and order")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    arms_in_turn: bool = setting(False, "the arms' steps take turns, so that a machine's moods fall on all of them")
    time_to_loss: float | None = setting(None, "the loss to time; null: the worst final loss of an arm")
    arms: dict[str, Any] = setting(
        {},
        "two or more, each with any settings of fcmae.pretrain that need not be the same",
        "{NAME: settings}",
        Config,
    )
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    mask: SharedMask = field(default_factory=SharedMask)
    loss: SharedLoss = field(default_factory=SharedLoss)
    data: ComparedData = field(default_factory=ComparedData)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


# What may change when a comparison goes on: as of any run, but for what makes its arms faster or slower, and what is
# only done once they are trained. The arms' own settings are held against their own folders.
_PACE = ("device", "train.batch_size", "train.accum_steps", "train.compile", "train.sharding", "sparse.backend")
FREE_KEYS = (
    *(key for key in settings.FREE_KEYS if key not in _PACE), "time_to_loss", "data.labelled",
    *(f"evaluate.{f.name}" for f in fields(EvaluateConfig)),
)  # fmt: skip


def arms_of(config: CompareConfig) -> dict[str, Config]:
    """Each arm's configuration as pretraining takes it, checked and filled.

    Raises UsageError for too few arms, a budget that is missing or given twice, values out of range, or an arm that
    sets what must be the same for all.
    """
    _check(config)
    arms = {}
    for name, own in config.arms.items():
        for key in settings.flatten(own or {}):
            if reason := _refusal(key):
                raise UsageError(f"arms.{name}.{key}: {reason}")
        arm = settings.override(_shared(config, name), own or {}, f"arms.{name}")
        try:
            checks.check(arm)
        except UsageError as error:
            raise UsageError(f"arm {name}: {error}") from None
        family.fill(arm)
        arms[name] = arm
    return arms


def check_alike(models: dict[str, MaskedAutoencoder], schedules: dict[str, Schedule]) -> None:
    """Raises UsageError when two arms would not see the same crops and masks, or be measured by the same numbers."""
    rows = {
        "mask.unit": {name: m.mask_unit for name, m in models.items()},
        "mask.ratio": {name: m.mask_ratio for name, m in models.items()},
        "train.effective_batch": {name: s.effective_batch for name, s in schedules.items()},
    }
    rows["loss.pca"] = {
        name: m.target and f"{m.predicted} components of {m.patch_size} px" for name, m in models.items()
    }
    if next(iter(models.values())).norm_pix:
        rows["loss.norm_window"] = {name: m.norm_window or m.patch_size for name, m in models.items()}
    for key, values in rows.items():
        if len(set(values.values())) > 1:
            each = ", ".join(f"{value} of {name}" for name, value in values.items())
            raise UsageError(f"{key} must be the same for all arms and is {each}; set {key} for all of them")


def _check(config: CompareConfig) -> None:
    steps, seconds, e = config.budget.steps, config.budget.seconds, config.evaluate
    if len(config.arms) < 2:
        count = "only one arm" if config.arms else "no arms"
        raise UsageError(f"{count} to compare; give two or more, e.g. arms.vit.model.name=mae_vit_tiny_patch16")
    for name in config.arms:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise UsageError(f"arms.{name}: a name becomes a folder; use letters, digits, - and _")
        if name in ("original", "masked"):
            raise UsageError(f"arms.{name}: so the report calls a column of its pictures; choose another name")
    if (steps is None) == (seconds is None):
        found = "no budget" if steps is None else f"both budget.steps={steps} and budget.seconds={seconds:g}"
        raise UsageError(f"{found}; give one of budget.steps and budget.seconds, which every arm has for training")
    rules = [
        (config.out, "out", "the folder of the comparison, e.g. out=runs/compare"),
        (steps is None or steps >= 1, "budget.steps", "1 or more"),
        (seconds is None or seconds > 0, "budget.seconds", "more than 0"),
        (e.images >= 0, "evaluate.images", "0 or more"),
        (e.distance_images >= 1, "evaluate.distance_images", "1 or more"),
        (e.neighbours >= 1, "evaluate.neighbours", "1 or more"),
        (e.temperature > 0, "evaluate.temperature", "more than 0"),
        (e.decay >= 0, "evaluate.decay", "0 or more"),
        (0 < e.val_share < 1, "evaluate.val_share", "between 0 and 1, both excluded"),
        (e.labelled_images >= 2, "evaluate.labelled_images", "2 or more"),
        (e.batch_size >= 1, "evaluate.batch_size", "1 or more"),
    ]
    known = settings.flatten(settings.to_dict(config))
    for key, value in known.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key}={value} will not do: it must be a finite number")
    for holds, key, wanted in rules:
        if not holds:
            value = known[key]
            raise UsageError(f"{key}={'null' if value is None else value} will not do: it must be {wanted}")
    for key in ("train.steps", "train.seconds"):
        if known[key] is not None:
            raise UsageError(f"{key}={known[key]:g} will not do: {_BUDGET}")


def _refusal(key: str) -> str | None:
    """Why an arm may not set a key of its own; None if it may."""
    if key in ("out", "resume"):
        return _FOLDER
    if key in ("train.epochs", "train.steps", "train.seconds"):
        return _BUDGET
    same = ("seed", "device", "model.image_size", "model.in_chans")
    return _SAME if key in same or key.split(".")[0] in ("data", "mask", "loss") else None


def _shared(config: CompareConfig, name: str) -> Config:
    """What an arm is before its own settings."""
    own = copy.deepcopy(config)
    arm = Config(
        out=None if own.out is None else f"{own.out}/arms/{name}",
        seed=own.seed,
        device=own.device,
        model=own.model,
        sparse=own.sparse,
        mask=MaskConfig(**vars(own.mask)),
        loss=LossConfig(**vars(own.loss)),
        data=DataConfig(**{f.name: getattr(own.data, f.name) for f in fields(DataConfig)}),
        train=own.train,
        checkpoint=own.checkpoint,
        log=own.log,
    )
    arm.train.steps, arm.train.seconds = own.budget.steps, own.budget.seconds
    return arm
