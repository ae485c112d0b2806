"""The settings of a pretraining run: their types, defaults and one line of help each. `fcmae.config` loads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(default: Any, text: str, type: str | None = None, each: type | None = None) -> Any:
    """A setting: its default, its one line in --help, and how its type reads there where the annotation is too wide.

    each: the schema of every value of a setting that maps names to settings.
    """
    meta = {"help": text, "type": type, "each": each}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class ModelConfig:
    name: str = setting("fcmae_convnextv2_atto", "model, e.g. fcmae_convnextv2_base or mae_vit_base_patch16")
    image_size: Any = setting(
        224, "pixels: one number or [height, width], multiples of the mask unit", "int | [int, int]"
    )
    in_chans: int = setting(3, "image channels")
    depths: list[int] | None = setting(None, "ConvNeXt: blocks per stage; null: the named size's")
    dims: list[int] | None = setting(None, "ConvNeXt: widths per stage; null: the named size's")
    norm: str = setting("grn", "ConvNeXt: norm in a block after its GELU: grn, ln, bn, lrn, or none (V1's block)")
    patch_size: int | None = setting(None, "ViT: side of a patch in pixels; null: the named size's")
    dim: int | None = setting(None, "ViT: width; null: the named size's")
    depth: int | None = setting(None, "ViT: blocks; null: the named size's")
    heads: int | None = setting(None, "ViT: attention heads; null: the named size's")
    encoder_mask_tokens: bool = setting(False, "ViT: the encoder sees mask tokens in place of the masked patches")
    decoder: str | None = setting(None, "convnext, vit or unet; null: convnext of FCMAE; MAE has vit, always")
    decoder_dim: int | None = setting(None, "width of the decoder; null: 512")
    decoder_depth: int | None = setting(None, "blocks of the decoder; null: 1 of FCMAE, 8 of MAE")
    decoder_heads: int | None = setting(None, "attention heads of a decoder of ViT blocks; null: 16")


@dataclass
class SparseConfig:
    backend: str = setting("auto", "how a ConvNet runs on visible regions: auto, native, reference, dense or minkowski")
    grn: str = setting("per_image", "GRN pools over each image (per_image) or the local batch (batch)")


@dataclass
class MaskConfig:
    ratio: float | None = setting(
        None, "share of regions hidden, int(L * (1 - ratio)) of L stay; null: 0.6 of FCMAE, 0.75 of MAE"
    )
    unit: int | None = setting(
        None, "side of a region in pixels, a multiple of MAE's patch; null: the patch, 32 of FCMAE"
    )
    strategy: str = setting("random", "random, block or grid")


@dataclass
class LossConfig:
    norm_pix: bool = setting(True, "normalize the target's pixels within each window")
    norm_window: int | None = setting(None, "window side in pixels; null: the model's patch")
    pca: int | None = setting(None, "top principal components of a patch to predict; null: its pixels")


@dataclass
class DataConfig:
    source: str | None = setting(
        None, "folder, .txt/.csv list, tar shards (file, glob, {000..015}), datasets folder, or: sample"
    )
    workers: int = setting(-1, "loader processes per rank; -1: one per core of this rank, 8 at most")
    prefetch: int = setting(2, "batches each worker prepares ahead")
    pin_memory: bool = setting(True, "page-locked batches when training on CUDA")
    crop: str = setting("random", "random (resized), fixed (shorter side 256/224 of the crop) or center (of the same)")
    crop_scale: list[float] = setting([0.2, 1.0], "area range of the random resized crop")
    flip: float = setting(0.5, "probability of a horizontal flip")
    color_jitter: float = setting(0.0, "brightness, contrast and saturation by up to this share; 0: none")
    mean: list[float] | None = setting(None, "per channel; null: ImageNet for 3 channels, 0.5 otherwise")
    std: list[float] | None = setting(None, "per channel; null: ImageNet for 3 channels, 0.5 otherwise")
    max_bad_share: float = setting(
        0.01, "stop when more than this share of the training images read (of 1,000 at least) was unreadable"
    )


@dataclass
class TrainConfig:
    epochs: float = setting(800, "passes over the data")
    steps: int | None = setting(None, "optimizer steps; overrides epochs")
    seconds: float | None = setting(
        None, "training time in place of steps; the schedule of `epochs` is stretched over it"
    )
    batch_size: int = setting(64, "images per process and forward pass")
    accum_steps: int = setting(1, "forward passes per optimizer step")
    effective_batch: int | None = setting(None, "images per optimizer step over all processes; sets accum_steps")
    base_lr: float = setting(1.5e-4, "lr = base_lr * effective batch / 256")
    lr: float | None = setting(None, "peak learning rate itself; overrides base_lr")
    min_lr: float = setting(0.0, "learning rate at the end of the cosine")
    warmup_epochs: float = setting(40, "linear warm-up")
    weight_decay: float = setting(0.05, "AdamW; none on biases, norms and GRN")
    betas: list[float] = setting([0.9, 0.95], "of AdamW, two numbers")
    clip_grad: float | None = setting(None, "largest gradient norm; null: no clipping")
    precision: str = setting("fp32", "fp32, bf16 or fp16 (autocast; fp16 with a loss scaler)")
    compile: bool = setting(False, "torch.compile the model")
    sharding: str = setting(
        "none",
        "none: every rank holds the whole model (DDP); full: it is spread over the ranks (FSDP2), pretraining only",
    )
    max_nonfinite: int = setting(20, "stop after so many steps in a row with a NaN or infinite gradient")
    spike_factor: float | None = setting(
        None,
        "go back to the last checkpoint when a loss is so many times the median of the last 100, pretraining only; "
        "null: never",
    )


@dataclass
class CheckpointConfig:
    every: int = setting(1000, "optimizer steps between checkpoints; one more is written at the end")
    keep_last: int = setting(2, "newest checkpoints kept, and as many of those whose step is a multiple of every")
    keep_every: int | None = setting(None, "every m-th checkpoint kept besides; null: none")


@dataclass
class LogConfig:
    every: int = setting(1, "optimizer steps between lines of metrics.jsonl and TensorBoard points")
    print_every: int = setting(20, "steps between printed lines when the output is not a terminal")
    tensorboard: bool = setting(True, "write TensorBoard events")
    images: int = setting(6, "images on a reconstruction picture; 0: no pictures")
    images_every: float = setting(1, "epochs between reconstruction pictures")
    collapse_every: int = setting(
        500, "optimizer steps between measurements of collapse (channels alike or dead); 0: none; not with minkowski"
    )


@dataclass
class Config:
    """Everything `python -m fcmae.pretrain` can be told."""

    out: str | None = setting(None, "run folder; a run that stopped there goes on from its newest whole checkpoint")
    resume: str | None = setting(None, "a checkpoint to start from while `out` has none of its own")
    init: str | None = setting(None, "weights to start from: any file or folder that fcmae.convert reads")
    seed: int = setting(0, "of the initial weights, crops, flips, masks and order")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    model: ModelConfig = field(default_factory=ModelConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
