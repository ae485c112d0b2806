"""Typed configuration: dataclasses, a YAML file, `key=value` overrides. The only file that knows OmegaConf."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fcmae.errors import UsageError, nearest
from fcmae.files import write_whole

C = TypeVar("C")


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
    patch_size: int | None = setting(None, "ViT: side of a patch in pixels; null: the named size's")
    dim: int | None = setting(None, "ViT: width; null: the named size's")
    depth: int | None = setting(None, "ViT: blocks; null: the named size's")
    heads: int | None = setting(None, "ViT: attention heads; null: the named size's")
    decoder_dim: int | None = setting(None, "width of the decoder; null: 512")
    decoder_depth: int | None = setting(None, "blocks of the decoder; null: 1 of FCMAE, 8 of MAE")
    decoder_heads: int | None = setting(None, "ViT: attention heads of the decoder; null: 16")


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


@dataclass
class DataConfig:
    source: str | None = setting(
        None, "folder, .txt/.csv list, tar shards (file, glob, {000..015}), datasets folder, or: sample"
    )
    workers: int = setting(-1, "loader processes per rank; -1: one per core of this rank, 8 at most")
    prefetch: int = setting(2, "batches each worker prepares ahead")
    pin_memory: bool = setting(True, "page-locked batches when training on CUDA")
    crop_scale: list[float] = setting([0.2, 1.0], "area range of the random resized crop")
    flip: float = setting(0.5, "probability of a horizontal flip")
    mean: list[float] | None = setting(None, "per channel; null: ImageNet for 3 channels, 0.5 otherwise")
    std: list[float] | None = setting(None, "per channel; null: ImageNet for 3 channels, 0.5 otherwise")
    max_bad_share: float = setting(0.01, "stop when more than this share of the images read was unreadable")


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
    max_nonfinite: int = setting(20, "stop after so many steps in a row with a NaN or infinite gradient")


@dataclass
class CheckpointConfig:
    every: int = setting(1000, "optimizer steps between checkpoints; one more is written at the end")
    keep_last: int = setting(2, "newest checkpoints kept")
    keep_every: int | None = setting(None, "every m-th checkpoint kept besides; null: none")


@dataclass
class LogConfig:
    every: int = setting(1, "optimizer steps between lines of metrics.jsonl and TensorBoard points")
    print_every: int = setting(20, "steps between printed lines when the output is not a terminal")
    tensorboard: bool = setting(True, "write TensorBoard events")
    images: int = setting(6, "images on a reconstruction picture; 0: no pictures")
    images_every: float = setting(1, "epochs between reconstruction pictures")


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


# Settings that say where and how fast a run goes on, not what it computes: a resumed run may change them.
FREE_KEYS = (
    "out", "resume", "device", "data.workers", "data.prefetch", "data.pin_memory", "data.max_bad_share",
    "train.batch_size", "train.accum_steps", "train.compile", "train.max_nonfinite", "sparse.backend",
    "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every",
    "log.print_every", "log.tensorboard", "log.images", "log.images_every",
)  # fmt: skip

# What a run branched off another one's checkpoint (resume=FILE out=NEW) may change besides.
BRANCH_KEYS = (
    *FREE_KEYS, "init", "data.source", "train.epochs", "train.steps", "train.seconds", "train.base_lr", "train.lr",
    "train.min_lr", "train.warmup_epochs", "train.clip_grad", "log.every",
)  # fmt: skip


def load(schema: type[C], path: str | Path, overrides: list[str]) -> C:
    """`schema()` with the YAML file at `path` and then `key=value` overrides merged in, types checked.

    Raises UsageError naming the file or override at fault, and the nearest key for an unknown one.
    """
    merged = OmegaConf.structured(schema)
    for where, layer in [(str(path), _read_yaml(path)), *((o, _read_override(schema, o)) for o in overrides)]:
        merged = _merge(merged, schema, layer, where)
    return _to_object(merged, str(path))


def override(config: C, layer: dict, where: str) -> C:
    """`config` with nested settings put over its own, as `load` would; `where` names them in errors."""
    return _to_object(_merge(OmegaConf.structured(config), type(config), OmegaConf.create(layer), where), where)


def to_dict(config: Any) -> dict:
    """The configuration as nested plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def write_yaml(config: Any, path: Path) -> None:
    """Write the configuration as YAML; the file appears whole or not at all."""
    text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
    write_whole(path, lambda file: file.write(text.encode()))


def differences(old: dict, new: dict, free: tuple[str, ...] = ()) -> list[str]:
    """Settings that differ, each as `key: old -> new`, those in `free` left out."""
    a, b = flatten(old), flatten(new)
    keys = [k for k in dict.fromkeys([*a, *b]) if k not in free and a.get(k) != b.get(k)]
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in keys]


def read_yaml(path: Path) -> dict:
    """A YAML file as plain values. Raises UsageError if it cannot be read."""
    return OmegaConf.to_container(_read_yaml(path))


def describe(schema: type) -> dict[str, tuple[str, Any, str]]:
    """Every key of a schema: its type as text, default, and one line of help."""
    found: dict[str, tuple[str, Any, str]] = {}
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            found |= {f"{f.name}.{key}": row for key, row in describe(hint).items()}
        else:
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            found[f.name] = (f.metadata.get("type") or _type_text(hint), default, f.metadata["help"])
    return found


def help_text(command: str, schema: type) -> str:
    """The text of --help: how to call the command and every key."""
    rows = describe(schema)
    wide = max(map(len, rows))
    lines = [f"  {key:<{wide}}  {kind} = {_yaml_text(default)}\n  {'':<{wide}}    {text}"
             for key, (kind, default, text) in rows.items()]  # fmt: skip
    return f"usage: python -m {command} CONFIG.yaml [key=value ...]\n\n{schema.__doc__}\n\n" + "\n".join(lines)


def flatten(layer: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dots in its keys."""
    plain = OmegaConf.to_container(layer) if OmegaConf.is_config(layer) else layer
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _merge(merged: Any, schema: type, layer: Any, where: str) -> Any:
    for key, value in flatten(layer).items():
        _check_known(schema, key, value, where)
    try:
        return OmegaConf.merge(merged, layer)
    except OmegaConfBaseException as error:
        key, wanted = error.full_key, ""
        if key in (described := describe(schema)):
            wanted = f"{key} takes {described[key][0]}: "
        raise UsageError(f"{where}: {wanted}{str(error).splitlines()[0]}") from None


def _to_object(merged: Any, where: str) -> Any:
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UsageError(f"{where}: {error.full_key}: {str(error).splitlines()[0]}") from None


def _inside(schema: type, key: str) -> tuple[type, str]:
    """The schema and key that `key` stands for: of `arms.NAME.seed`, where `arms` maps names to settings, theirs."""
    group, _, rest = key.partition(".")
    for f in dataclasses.fields(schema):
        if f.name == group and f.metadata.get("each"):
            return f.metadata["each"], rest.partition(".")[2]
    return schema, key


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_type_text(a) for a in typing.get_args(hint))
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is list:
        return f"[{_type_text(typing.get_args(hint)[0])}, ...]"
    return getattr(hint, "__name__", str(hint))


def _yaml_text(value: Any) -> str:
    if isinstance(value, (bool, type(None))):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _read_yaml(path: str | Path) -> Any:
    if Path(path).is_dir():
        raise UsageError(f"{path} is a folder: name a config file, such as the config.yaml of a run")
    if not Path(path).is_file():
        raise UsageError(f"no such config file: {path}")
    if Path(path).suffix in (".pt", ".pth", ".safetensors"):
        raise UsageError(f"{path} is no config file; to start from a checkpoint: CONFIG.yaml resume={path}")
    try:
        layer = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(layer):
        raise UsageError(f"{path} must hold `key: value` settings")
    return layer


def _read_override(schema: type, text: str) -> Any:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f"{text!r} is not of the form key=value")
    if not value.strip():
        raise UsageError(f"{text!r} gives no value; for none write {key}=null")
    inner, name = _inside(schema, key)
    if describe(inner).get(name, ("",))[0].startswith("str") and value != "null":
        value = os.path.expanduser(value)  # no shell does so after key=
        text = f"{key}={json.dumps(value)}"  # a folder may be called 007 or *.tar: YAML would see a number, an alias
    try:
        return OmegaConf.from_dotlist([text])
    except (YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"{text!r}: {' '.join(str(error).split())}") from None


def _check_known(schema: type, key: str, value: Any, where: str) -> None:
    whole, (schema, key) = key, _inside(schema, key)
    if not key:
        if value is None:
            return
        raise UsageError(f"{where}: {whole} takes settings, each as `key: value`; got {value!r}")
    known = describe(schema)
    groups = {k.rpartition(".")[0] for k in known} - {""}
    if key in groups:
        members = ", ".join(k for k in known if k.startswith(f"{key}."))
        raise UsageError(f"{where}: {key} is a group of settings; set one of {members}")
    if key not in known:
        leaf = key.rpartition(".")[2]
        same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
        hint = nearest(key, known) if not same_leaf else f" (did you mean {same_leaf[0]!r}?)"
        raise UsageError(f"{where}: unknown setting {key!r}{hint}; --help lists every one")
