"""Settings of every command, made up by hypothesis from what --help and the documents say they may be.

Written without a look at the checks, so that the two can disagree. `valid` gives {key: value} of which a run must
start; `broken` the same with one thing wrong, and what the error must name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

from fcmae import config as settings
from fcmae.comparison.settings import CompareConfig
from fcmae.downstream.settings import FinetuneConfig, ProbeConfig
from fcmae.schema import Config

SCHEMAS = {"pretrain": Config, "finetune": FinetuneConfig, "probe": ProbeConfig, "compare": CompareConfig}
IMAGES = 1024  # in the data that every made-up run has
CONVNETS = ["atto", "femto", "pico", "nano", "tiny", "base", "large", "huge"]
VITS = {"tiny_patch16": 16, "small_patch16": 16, "base_patch16": 16, "large_patch16": 16, "huge_patch14": 14}
share = st.floats(0, 1)
counted = st.integers(1, 10**6)
small = st.floats(1e-12, 10)
text = st.text(st.characters(codec="ascii", exclude_categories=("Cc",), exclude_characters="${}?"), min_size=1).map(
    lambda s: s.strip() or "x"
)


def maybe(draw: Callable, values: st.SearchStrategy) -> Any:
    """A value or null."""
    return draw(st.one_of(st.none(), values))


def some(draw: Callable, **options: st.SearchStrategy) -> dict[str, Any]:
    """Of these settings (`__` for the dot) some, each with a value."""
    return {key.replace("__", "."): draw(values) for key, values in options.items() if draw(st.booleans())}


def shared(draw: Callable, in_chans: int) -> dict[str, Any]:
    """What every training run has."""
    low, high = sorted((draw(st.floats(1e-3, 1)), draw(st.floats(1e-3, 1))))
    found = some(
        draw,
        seed=st.integers(0, 2**64 - 1), data__workers=st.integers(-1, 8), data__prefetch=st.integers(1, 9),
        data__pin_memory=st.booleans(), data__flip=share, data__max_bad_share=share,
        data__crop_scale=st.just([low, high]),
        data__mean=st.lists(st.floats(-10, 10), min_size=in_chans, max_size=in_chans),
        data__std=st.lists(small, min_size=in_chans, max_size=in_chans),
        checkpoint__every=counted, checkpoint__keep_last=counted, checkpoint__keep_every=st.one_of(st.none(), counted),
        log__every=counted, log__print_every=counted, log__tensorboard=st.booleans(),
    )  # fmt: skip
    return found | {"device": draw(st.sampled_from(["auto", "cpu"])), "model.in_chans": in_chans} | schedule(draw)


def schedule(draw: Callable) -> dict[str, Any]:
    """Batch, length and learning rate; IMAGES are there, in one process."""
    batch = draw(st.sampled_from([2, 4, 6, 8, 16, 64]))
    accumulated = draw(st.integers(1, 8))
    effective = batch * accumulated
    found = {"train.batch_size": batch, "train.weight_decay": draw(share)}
    found |= draw(st.sampled_from([
        {"train.accum_steps": accumulated}, {"train.effective_batch": effective},
        {"train.effective_batch": effective, "train.accum_steps": accumulated},
    ]))  # fmt: skip
    epochs = draw(st.floats(0.01, 2000))
    length = draw(st.sampled_from(["epochs", "steps", "seconds"]))
    if length == "steps":
        steps = draw(st.integers(1, 10**7))
        found["train.steps"], epochs = steps, steps * effective / IMAGES
    else:
        found["train.epochs"] = epochs
    if length == "seconds":
        found["train.seconds"] = draw(st.floats(0.1, 1e7))
    found["train.warmup_epochs"] = epochs * draw(st.floats(0, 0.99))
    lr = draw(st.floats(0, 10))
    found |= {"train.lr": lr} if draw(st.booleans()) else {"train.base_lr": lr, "train.lr": None}
    peak = lr if found["train.lr"] is not None else lr * effective / 256
    found["train.min_lr"] = peak * draw(st.floats(0, 0.999))
    more = some(
        draw, train__betas=st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
        train__clip_grad=st.one_of(st.none(), small), train__max_nonfinite=counted,
        train__precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    )  # fmt: skip
    return found | more


def mask(draw: Callable, regions: int) -> dict[str, Any]:
    """A ratio that leaves some regions and hides some."""
    left = draw(st.integers(1, regions - 1))
    found = {"mask.ratio": 1 - (left + 0.5) / regions} if draw(st.booleans()) or regions < 8 else {}
    return found | some(draw, mask__strategy=st.sampled_from(["random", "block", "grid"]))


def sides(draw: Callable, unit: int, fewest: int = 2) -> tuple[Any, int, int]:
    """model.image_size, and its height and width: of so many units at least."""
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    if rows * columns < fewest:
        rows = columns = fewest
    if rows == columns and draw(st.booleans()):
        return rows * unit, rows * unit, columns * unit
    return [rows * unit, columns * unit], rows * unit, columns * unit


def windows(draw: Callable, height: int, width: int) -> int:
    """A window that tiles such an image."""
    return draw(st.sampled_from([w for w in range(2, 65) if height % w == 0 and width % w == 0]))


def loss(draw: Callable, height: int, width: int, numbers: int) -> dict[str, Any]:
    """numbers: of a patch."""
    found = some(draw, loss__norm_pix=st.booleans(), loss__pca=st.one_of(st.none(), st.integers(1, min(numbers, 99))))
    return found | ({"loss.norm_window": windows(draw, height, width)} if draw(st.booleans()) else {})


def convnet(draw: Callable, tiny: bool = False) -> dict[str, Any]:
    """A ConvNet's own settings."""
    four = {"min_size": 4, "max_size": 4}
    found = {"model.name": f"fcmae_convnextv2_{draw(st.sampled_from(CONVNETS))}"}
    if tiny or draw(st.booleans()):
        found |= {
            "model.depths": draw(st.lists(st.integers(1, 2), **four)),
            "model.dims": draw(st.lists(st.integers(1, 4).map(lambda n: 8 * n), **four)),
        }
    norm = draw(st.sampled_from(["grn", "ln", "bn", "lrn", "none"]))
    found |= {"model.norm": norm, "sparse.backend": draw(st.sampled_from(["auto", "native", "reference", "dense"]))}
    if norm == "grn":
        found |= some(draw, sparse__grn=st.sampled_from(["per_image", "batch"]))
    kind = draw(st.sampled_from([None, "convnext", "vit", "unet"]))
    found |= {"model.decoder": kind, "model.decoder_dim": draw(st.sampled_from([64, 128]))}
    if kind == "vit":
        found["model.decoder_heads"] = maybe(draw, st.sampled_from([1, 2, 4, 8, 16]))
    return found | some(draw, model__decoder_depth=st.integers(0, 3))


def vit(draw: Callable, patch: int, tiny: bool = False) -> dict[str, Any]:
    """A ViT's own settings, for patches of such a size."""
    heads, decoder_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    name = draw(st.sampled_from(list(VITS)))
    found = {"model.name": f"mae_vit_{name}"}
    if VITS[name] != patch or draw(st.booleans()):
        found["model.patch_size"] = patch
    if tiny or draw(st.booleans()):
        found |= {
            "model.dim": 4 * heads * draw(st.integers(1, 8)),
            "model.heads": heads,
            "model.depth": draw(st.integers(1, 3)),
        }
    found |= {"model.decoder_dim": 4 * decoder_heads * draw(st.integers(1, 8)), "model.decoder_heads": decoder_heads}
    return found | some(
        draw,
        model__decoder_depth=st.integers(0, 3),
        model__encoder_mask_tokens=st.booleans(),
        model__decoder=st.just("vit"),
    )


@st.composite
def pretrain(draw: Callable, tiny: bool = False) -> dict[str, Any]:
    """Settings of fcmae.pretrain. tiny: of a model that a CPU trains at once."""
    in_chans = 3 if tiny else draw(st.sampled_from([1, 3, 3, 3, 4, 13]))
    found = shared(draw, in_chans) | {"out": draw(text)} | some(
        draw, log__images=st.integers(0, 9), log__images_every=small, log__collapse_every=st.integers(0, 10**6),
        train__spike_factor=st.one_of(st.none(), st.floats(1.01, 100)),
        data__crop=st.sampled_from(["random", "fixed", "center"]),
    )  # fmt: skip
    if in_chans in (1, 3):
        found |= some(draw, data__color_jitter=share)
    if draw(st.booleans()):
        unit = patch = 32
        found |= convnet(draw, tiny)
        size, height, width = sides(draw, 32)
    else:
        patch = draw(st.sampled_from([8, 14, 16, 32]))
        times = draw(st.integers(1, 2))
        unit = patch * times
        found |= vit(draw, patch, tiny) | ({"mask.unit": unit} if times > 1 or draw(st.booleans()) else {})
        size, height, width = sides(draw, unit)
    found |= mask(draw, height * width // unit**2) | loss(draw, height, width, patch**2 * in_chans)
    if found.get("train.precision") != "fp16" and not tiny:
        found |= some(draw, train__sharding=st.sampled_from(["none", "full"]), train__compile=st.booleans())
    return found | {"model.image_size": size}


def downstream(draw: Callable, tiny: bool) -> dict[str, Any]:
    """What fine-tuning and probing share."""
    in_chans = 3 if tiny else draw(st.sampled_from([1, 3, 3, 13]))
    found = shared(draw, in_chans) | {"out": draw(text)}
    if draw(st.booleans()):
        found["model.name"] = f"convnextv2_{'atto' if tiny else draw(st.sampled_from(CONVNETS))}"
        size, _, _ = sides(draw, draw(st.sampled_from([32, 35, 40])), 1)
        found |= some(draw, train__layer_decay_scheme=st.sampled_from([None, "block", "group"]))
    else:
        name = "tiny_patch16" if tiny else draw(st.sampled_from(list(VITS)))
        found["model.name"] = f"vit_{name}_224"
        size, _, _ = sides(draw, VITS[name])
    found["model.image_size"] = size
    found |= some(
        draw,
        model__pool=st.sampled_from(["avg", "token"]), model__drop_path=st.floats(0, 0.9), model__head_init_scale=share,
        model__classes=st.sampled_from([None, 4]), data__fraction=st.floats(0.01, 1), data__random_erasing=share,
        data__mixup=share, data__cutmix=share, data__mixup_prob=share, data__mixup_switch_prob=share,
        data__crop_pct=st.one_of(st.none(), st.floats(0.1, 1)), data__crop_mode=st.sampled_from(["center", "squash"]),
        data__interpolation=st.sampled_from(["bicubic", "bilinear"]),
        train__optimizer=st.sampled_from(["adamw", "lars"]),
        train__layer_decay=st.one_of(st.none(), st.floats(0.01, 1)), train__label_smoothing=st.floats(0, 0.9),
        ema__enabled=st.booleans(), ema__decay=st.floats(0, 0.9999), eval__every=small, eval__batch_size=counted,
    )  # fmt: skip
    if in_chans == 3:
        found |= some(
            draw, data__randaugment=st.sampled_from([None, "rand-m9-mstd0.5-inc1", "rand-m5-n2", "rand-m9-p0.5"])
        )
    return found


@st.composite
def finetune(draw: Callable, tiny: bool = False) -> dict[str, Any]:
    """Settings of fcmae.finetune."""
    return downstream(draw, tiny)


@st.composite
def probe(draw: Callable, tiny: bool = False) -> dict[str, Any]:
    """Settings of fcmae.probe."""
    blocks = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=4, unique=True)
    more = some(
        draw, probe__mode=st.sampled_from(["linear", "partial", "knn"]), probe__blocks=blocks,
        probe__batch_norm=st.booleans(), probe__neighbours=st.lists(counted, min_size=1, max_size=4),
        probe__temperature=small, probe__decay=share,
    )  # fmt: skip
    return downstream(draw, tiny) | more


@st.composite
def compare(draw: Callable, tiny: bool = False) -> dict[str, Any]:
    """Settings of fcmae.compare: two arms or three, images and masks of 32-pixel units for all of them."""
    found = shared(draw, 3) | {"out": draw(text)}
    epochs = found.pop("train.epochs", None)
    steps, seconds = found.pop("train.steps", None), found.pop("train.seconds", None)
    if steps is None:
        found["train.epochs"], seconds = epochs, seconds or 10.0
        found["budget.seconds"] = seconds
    else:
        found["budget.steps"] = steps
    size, height, width = sides(draw, 32)
    found |= {"model.image_size": size} | mask(draw, height * width // 1024)
    found.setdefault("mask.ratio", 0.5)
    found |= some(
        draw,
        data__crop=st.sampled_from(["random", "fixed", "center"]), data__color_jitter=share, data__flip=share,
        log__images=st.integers(0, 9), log__images_every=small, log__collapse_every=st.integers(0, 10**6),
        loss__norm_pix=st.booleans(), arms_in_turn=st.booleans(), time_to_loss=small,
        evaluate__images=st.integers(0, 9), evaluate__neighbours=counted, evaluate__temperature=small,
        evaluate__val_share=st.floats(0.1, 0.9), evaluate__decay=share, evaluate__batch_size=counted,
        evaluate__labelled_images=st.integers(2, 10**6), evaluate__distance_images=counted,
    )  # fmt: skip
    for name in draw(st.sampled_from([("a", "b"), ("vit", "2nd", "c-d_e")])):
        own = convnet(draw, tiny) if draw(st.booleans()) else vit(draw, draw(st.sampled_from([8, 16, 32])), tiny)
        found |= {f"arms.{name}.{key}": value for key, value in own.items()}
    return found


VALID = {"pretrain": pretrain, "finetune": finetune, "probe": probe, "compare": compare}


@st.composite
def broken(draw: Callable, command: str) -> tuple[dict[str, Any], list[str], str]:
    """(settings, words put behind them, what the error must name): valid but for one thing."""
    found, known = draw(VALID[command](tiny=True)), settings.describe(SCHEMAS[command])
    known = {key: row for key, row in known.items() if key != "arms"}
    key = draw(st.sampled_from(sorted(known)))
    kind, default, _ = known[key]
    how = draw(st.sampled_from(["type", "null", "unknown", "misspelt", "list", "group", "range", "range"]))
    if how == "null" and "null" not in kind:
        return found | {key: None}, [], key
    if how == "list" and kind.startswith("["):
        return found | {key: draw(st.sampled_from([0.5, "abc", [1, [2]], [0.5, None], ["a", "b"], True]))}, [], key
    if how == "unknown":
        name = draw(st.sampled_from(["nonsense", f"{key}.more", f"{key}s", f"x{key}", "model.nme", "0"]))
        return found, [f"{name}=1"], name
    if how == "misspelt" and "." in key:
        group, name = key.rsplit(".", 1)
        other = draw(
            st.sampled_from([f"{group}_{name}", f"{group}.{name.replace('_', '-')}-", f"{group}.{name.upper()}"])
        )
        return (found, [f"{other}=1"], other) if other not in known else (found | {"mask_ratio": 0.5}, [], "mask_ratio")
    if how == "group" and "." in key:
        group = key.split(".")[0]
        return found, [f"{group}={draw(st.sampled_from(['1', 'null', '[1]', 'x']))}"], group
    if how == "range":
        able = sorted(k for k in OUT_OF_RANGE if k in known and not (command == "compare" and k in OF_ARMS))
        key = draw(st.sampled_from(able))
        return found | {key: draw(st.sampled_from(OUT_OF_RANGE[key]))}, [], key
    return found | {key: draw(st.sampled_from(wrong_types(kind)))}, [], key


def wrong_types(kind: str) -> list[Any]:
    """Values that a setting of this kind cannot have."""
    if kind.startswith("["):
        return [0.5, "abc", True, {"a": 1}]
    if kind.startswith("str"):
        return [{"a": 1}]  # anything is text on a command line
    if kind.startswith("bool"):
        return ["perhaps", [True], "2026-01-01"]
    return ["abc", [1, 2], [], "1,5", *([1.5, True] if kind == "int" else [])] if "[" not in kind else ["abc", [1], 1.5]


# Values of the right type that nobody can mean, by what --help says.
OUT_OF_RANGE = {
    "seed": [-1, 2**64], "device": ["gpu", "cuda:99", "tpu"], "model.in_chans": [0, -3],
    "model.image_size": [0, -32, [32], [32, 32, 32], [0, 32], 31, [64, 33.0], "64x64"],
    "model.name": ["resnet50", "fcmae_convnextv2_small", "vit"], "model.norm": ["batchnorm"],
    "mask.ratio": [0.0, 1.0, 1.5, -0.5], "mask.unit": [0, -32, 17], "mask.strategy": ["blocks"],
    "loss.norm_window": [0, -1], "loss.pca": [0, -1, 10**9], "sparse.backend": ["fast"], "sparse.grn": ["layer"],
    "model.decoder": ["transformer"], "model.decoder_dim": [0, -4], "model.decoder_depth": [-1],
    "data.crop": ["left"], "data.crop_scale": [[1.0, 0.2], [0.0, 1.0], [0.2, 1.5], [0.5], []],
    "data.flip": [-0.1, 1.1], "data.color_jitter": [-1.0, 2.0], "data.workers": [-2], "data.prefetch": [0],
    "data.max_bad_share": [-0.1, 2.0], "data.mean": [[0.5] * 20, []], "data.std": [[0.0] * 13, [0.5] * 20],
    "data.source": ["/nowhere/at/all"], "data.train": ["/nowhere/at/all"],
    "train.epochs": [0.0, -1.0, float("inf"), float("nan")], "train.steps": [0, -5], "train.seconds": [0.0, -1.0],
    "train.batch_size": [0, -8, 10**6], "train.accum_steps": [0, -1], "train.effective_batch": [0, -1, 10**6],
    "train.base_lr": [-1.0, float("nan")], "train.lr": [-1e-3, float("inf")], "train.min_lr": [-1.0, 1e9],
    "train.warmup_epochs": [-1.0, 1e12], "train.weight_decay": [-0.1],
    "train.betas": [[0.9], [0.9, 1.0], [-0.1, 0.5], []], "train.clip_grad": [0.0, -1.0],
    "train.precision": ["fp8", "float32"], "train.max_nonfinite": [0], "train.spike_factor": [1.0, -2.0],
    "train.sharding": ["half"],
    "checkpoint.every": [0, -1], "checkpoint.keep_last": [0], "checkpoint.keep_every": [0], "log.every": [0],
    "log.print_every": [0], "log.images": [-1], "log.images_every": [0.0], "log.collapse_every": [-1],
    "model.pool": ["max"], "model.drop_path": [-0.1, 1.0], "model.head_init_scale": [-1.0],
    "model.classes": [0, 1, 999], "data.fraction": [0.0, 1.1], "data.randaugment": ["auto", "rand-9"],
    "data.random_erasing": [1.1], "data.mixup": [-1.0], "data.cutmix": [-1.0], "data.mixup_prob": [2.0],
    "data.mixup_switch_prob": [-1.0], "data.crop_pct": [0.0, 1.5], "data.crop_mode": ["left"],
    "data.interpolation": ["nearest"], "train.optimizer": ["sgd"], "train.layer_decay": [0.0, 1.5],
    "train.layer_decay_scheme": ["stage"], "train.label_smoothing": [1.0, -0.1], "ema.decay": [1.0, -0.1],
    "eval.every": [0.0], "eval.batch_size": [0], "probe.mode": ["svm"],
    "probe.blocks": [[], [-1.0], [0.3], [1.0, 1.0]], "probe.neighbours": [[], [0]], "probe.temperature": [0.0],
    "probe.decay": [-1.0], "budget.steps": [0], "budget.seconds": [0.0], "evaluate.images": [-1],
    "evaluate.neighbours": [0], "evaluate.val_share": [0.0, 1.0], "evaluate.batch_size": [0],
    "evaluate.temperature": [0.0], "evaluate.decay": [-1.0], "evaluate.labelled_images": [1],
    "evaluate.distance_images": [0],
}  # fmt: skip
# Of a comparison each arm has its own.
OF_ARMS = ("model.name", "model.norm", "model.decoder", "model.decoder_dim", "model.decoder_depth", "sparse.backend",
           "sparse.grn")  # fmt: skip


def arguments(found: dict[str, Any], draw: Callable, folder) -> list[str]:
    """A config file with some of the settings, and words with the rest, as people write them."""
    words, nested = [], {}
    for key, value in found.items():
        by_word = not key.startswith("arms.") and not isinstance(value, dict) and draw(st.booleans())
        if by_word and not (isinstance(value, (str, list)) and not value):
            words.append(f"{key}={word(value)}")
            continue
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    path = folder / "made.yaml"
    path.write_text(yaml.safe_dump(nested, allow_unicode=draw(st.booleans())), encoding="utf-8")
    return [str(path), *words]


def word(value: Any) -> str:
    """A value on a command line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "[" + ",".join(map(word, value)) + "]"
    if isinstance(value, float):
        return {"inf": ".inf", "nan": ".nan"}.get(repr(value), repr(value))
    return json.dumps(value)
