"""The configuration of what begins from pretrained weights: fine-tuning and probing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fcmae import config as settings
from fcmae.schema import CheckpointConfig, TrainConfig, setting


@dataclass
class DownstreamModel:
    name: str | None = setting(None, "timm's name, e.g. convnextv2_base or vit_base_patch16_224; null: what init holds")
    image_size: Any = setting(
        None, "pixels: one number or [height, width], of a ViT multiples of its patch; null: 224, or to validate only "
        "what a fine-tuned init has", "int | [int, int] | null",
    )  # fmt: skip
    in_chans: int = setting(3, "image channels")
    classes: int | None = setting(None, "classes that there must be; null: as many as data.train has")
    pool: str = setting("avg", "ViT: the classifier sees the mean of the patches (avg) or the class token (token)")
    drop_path: float = setting(0.0, "stochastic depth: the last block's rate, growing linearly up to it")
    head_init_scale: float = setting(1e-3, "of the new classifier's weights, whose std is 0.02 times it")


@dataclass
class DownstreamData:
    train: str | None = setting(None, "class folders, or a .csv of path,label, to train on")
    val: str | None = setting(None, "the same to validate on")
    fraction: float = setting(1.0, "share of every class to train on, one image at least, chosen by the seed")
    workers: int = setting(-1, "loader processes per rank; -1: one per core of this rank, 8 at most")
    prefetch: int = setting(2, "batches each worker prepares ahead")
    pin_memory: bool = setting(True, "page-locked batches when training on CUDA")
    crop_scale: list[float] = setting([0.08, 1.0], "area range of the random resized crop")
    flip: float = setting(0.5, "probability of a horizontal flip")
    randaugment: str | None = setting(None, "timm's words for it, e.g. rand-m9-mstd0.5-inc1; null: none")
    random_erasing: float = setting(0.0, "probability of a rectangle of noise")
    mixup: float = setting(0.0, "alpha of mixup; 0: none")
    cutmix: float = setting(0.0, "alpha of cutmix; 0: none")
    mixup_prob: float = setting(1.0, "probability that a batch is mixed, by whichever of the two is on")
    mixup_switch_prob: float = setting(0.5, "probability that it is by cutmix, where both are on")
    crop_pct: float | None = setting(
        None, "to validate: side of the centre crop as a share of the scaled image; null: 0.875, beyond 224 px 1.0"
    )
    crop_mode: str = setting("center", "to validate: center (aspect kept, cropped) or squash (scaled to the size)")
    interpolation: str = setting("bicubic", "bicubic or bilinear")
    mean: list[float] | None = setting(None, "per channel; null: ImageNet for 3 channels, 0.5 otherwise")
    std: list[float] | None = setting(None, "per channel; null: ImageNet for 3 channels, 0.5 otherwise")
    max_bad_share: float = setting(
        0.01, "stop when more than this share of the training images read (of 1,000 at least) was unreadable"
    )


@dataclass
class DownstreamTrain(TrainConfig):
    epochs: float = setting(100, "passes over the data")
    base_lr: float = setting(5e-4, "lr = base_lr * effective batch / 256")
    min_lr: float = setting(1e-6, "of the cosine's end")
    betas: list[float] = setting([0.9, 0.999], "of AdamW, two numbers")
    optimizer: str = setting("adamw", "adamw or lars")
    layer_decay: float | None = setting(None, "lr of a layer = lr * this ** (layers above it); null: the same for all")
    layer_decay_scheme: str | None = setting(
        None, "block: a layer is a block; group: three blocks, of ConvNets; null: as published for such sizes"
    )
    label_smoothing: float = setting(0.0, "share of a label that is spread over all classes")


@dataclass
class EmaConfig:
    enabled: bool = setting(False, "keep, validate and export a moving average of the weights")
    decay: float = setting(0.9999, "of the average, per optimizer step")


@dataclass
class EvalConfig:
    every: float = setting(1, "epochs between validations; there is one more at the end")
    batch_size: int = setting(64, "images per process and forward pass")


@dataclass
class RunLog:
    every: int = setting(1, "optimizer steps between lines of metrics.jsonl and TensorBoard points")
    print_every: int = setting(20, "steps between printed lines when the output is not a terminal")
    tensorboard: bool = setting(True, "write TensorBoard events")


@dataclass
class DownstreamConfig:
    """What fine-tuning and probing share."""

    out: str | None = setting(None, "run folder; a run that stopped there goes on from its newest whole checkpoint")
    resume: str | None = setting(None, "a checkpoint to start from while `out` has none of its own")
    init: str | None = setting(
        None, "weights to start from: what fcmae.convert reads, or a fine-tuned run; null: random ones"
    )
    seed: int = setting(0, "of initial weights, crops, augmentation, drop path and order")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    model: DownstreamModel = field(default_factory=DownstreamModel)
    data: DownstreamData = field(default_factory=DownstreamData)
    train: DownstreamTrain = field(default_factory=DownstreamTrain)
    ema: EmaConfig = field(default_factory=EmaConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: RunLog = field(default_factory=RunLog)


@dataclass
class FinetuneConfig(DownstreamConfig):
    """Everything `python -m fcmae.finetune` can be told. --eval is short for eval_only=true; besides,
    `--table RUN RUN ...` compares finished runs."""

    eval_only: bool = setting(False, "only validate init, or the best weights of the run in `out`, on data.val")


@dataclass
class ProbeSettings:
    mode: str = setting("linear", "linear, partial or knn")
    blocks: list[float] = setting(
        [0.0, 0.5, 1.0, 2.0, 4.0], "partial: how many of the last blocks are trained, a run each"
    )
    batch_norm: bool = setting(True, "linear, partial: BatchNorm without affine before the classifier")
    neighbours: list[int] = setting([10, 20, 200], "knn: nearest training images that vote")
    temperature: float = setting(0.07, "knn: a vote weighs exp(cosine / temperature)")
    decay: float = setting(1e-3, "knn: weight decay of the logistic regression on the same features")


@dataclass
class ProbeConfig(DownstreamConfig):
    """Everything `python -m fcmae.probe` can be told. --mode MODE is short for probe.mode=MODE."""

    probe: ProbeSettings = field(default_factory=ProbeSettings)


# What a resumed run may change: where and how fast it goes on, not what it computes.
FREE_KEYS = (
    "out", "resume", "device", "data.workers", "data.prefetch", "data.pin_memory", "data.max_bad_share",
    "train.batch_size", "train.accum_steps", "train.compile", "train.max_nonfinite", "eval.batch_size", "eval_only",
    "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every", "log.print_every", "log.tensorboard",
)  # fmt: skip

# And one branched off another's checkpoint (resume=FILE out=NEW) besides.
BRANCH_KEYS = (
    *FREE_KEYS, "init", "data.train", "data.val", "train.epochs", "train.steps", "train.seconds", "train.base_lr",
    "train.lr", "train.min_lr", "train.warmup_epochs", "train.clip_grad", "eval.every", "log.every",
)  # fmt: skip


def free_keys(config: DownstreamConfig) -> tuple[str, ...]:
    """What a resumed run may change."""
    return _allowed(config, FREE_KEYS)


def branch_keys(config: DownstreamConfig) -> tuple[str, ...]:
    """What a run branched off another's checkpoint may change."""
    return _allowed(config, BRANCH_KEYS)


def _allowed(config: DownstreamConfig, keys: tuple[str, ...]) -> tuple[str, ...]:
    # BatchNorm makes the images of a pass one computation.
    together = isinstance(config, ProbeConfig) and config.probe.mode != "knn" and config.probe.batch_norm
    return tuple(key for key in keys if not (together and key in ("train.batch_size", "train.accum_steps")))


def crop_pct(config: DownstreamConfig, size: tuple[int, int]) -> float:
    """The validation crop's share of the scaled image, as MAE's code has it where data.crop_pct is null."""
    if config.data.crop_pct is not None:
        return config.data.crop_pct
    return 0.875 if max(size) <= 224 else 1.0


def image_size(config: DownstreamConfig) -> tuple[int, int]:
    """(H, W) in pixels. Raises UsageError unless model.image_size is one whole number or two."""
    return settings.sides(224 if config.model.image_size is None else config.model.image_size)
