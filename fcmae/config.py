"""Typed configuration: a schema, a YAML file, `key=value` overrides. The only file that knows OmegaConf."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fcmae.errors import UsageError, nearest
from fcmae.files import write_whole

C = TypeVar("C")

_DIGITS = re.compile(r"\d+")
_IN_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}

# Settings that say where and how fast a run goes on, and what is done when numbers go wrong, but nothing else of what
# it computes: a resumed run may change them.
FREE_KEYS = (
    "out", "resume", "device", "data.workers", "data.prefetch", "data.pin_memory", "data.max_bad_share",
    "train.batch_size", "train.accum_steps", "train.compile", "train.sharding", "train.max_nonfinite",
    "train.spike_factor", "sparse.backend", "checkpoint.every", "checkpoint.keep_last", "checkpoint.keep_every",
    "log.print_every", "log.tensorboard", "log.images", "log.images_every", "log.collapse_every",
)  # fmt: skip

# What a run branched off another one's checkpoint (resume=FILE out=NEW) may change besides.
BRANCH_KEYS = (
    *FREE_KEYS, "init", "data.source", "train.epochs", "train.steps", "train.seconds", "train.base_lr", "train.lr",
    "train.min_lr", "train.warmup_epochs", "train.clip_grad", "log.every",
)  # fmt: skip


def sides(value: Any) -> tuple[int, int]:
    """A model.image_size as (H, W) in pixels. Raises UsageError unless it is one whole number or two, 1 or more."""
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(v) is int and v >= 1 for v in pair):
        raise UsageError(f"model.image_size={value} must be a whole number of pixels or [height, width]")
    return pair[0], pair[1]


def load(schema: type[C], path: str | Path, overrides: list[str]) -> C:
    """`schema()` with the YAML file at `path` and then `key=value` overrides merged in, types checked.

    Raises UsageError naming the file or override at fault, and the nearest key for an unknown one.
    """
    check_repeats(overrides)
    merged = OmegaConf.structured(schema)
    for where, layer in [(str(path), _read_yaml(path)), *((o, _read_override(schema, o)) for o in overrides)]:
        merged = _merge(merged, schema, layer, where)
    return _to_object(merged, str(path))


def check_repeats(overrides: list[str]) -> None:
    """Raises UsageError for two shards in a row whose names differ in digits alone: a shell made them of {000..015}."""
    for one, two in itertools.pairwise(overrides):
        alike = _DIGITS.sub("0", one) == _DIGITS.sub("0", two)
        if alike and one != two and "=" in one and one.endswith(".tar"):
            key = one.partition("=")[0]
            raise UsageError(
                f"{key} is given twice in a row, {one} {two}: what the shell expands needs quotes, "
                f"'{key}=...{{000..015}}...'"
            )


def repeats(overrides: list[str]) -> list[str]:
    """Of every key that is set more than once a line that says which of the words counts."""
    words: dict[str, list[str]] = {}
    for word in overrides:
        words.setdefault(word.partition("=")[0], []).append(word)
    return [f"{key} is given {len(w)} times; the last counts, {w[-1]}" for key, w in words.items() if len(set(w)) > 1]


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


def differences(old: dict, new: dict, free: Sequence[str] = ()) -> list[str]:
    """Settings that differ, each as `key: old -> new`, those in `free` left out."""
    a, b = flatten(old), flatten(new)
    keys = [k for k in dict.fromkeys([*a, *b]) if k not in free and a.get(k) != b.get(k)]
    return [f"{k}: {a.get(k)} -> {b.get(k)}" for k in keys]


def shown(changed: list[str]) -> str:
    """The first of such differences, and how many more there are."""
    return "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


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
    given = flatten(layer)
    for key, value in given.items():
        _check_known(schema, key, value, where)
    try:
        return OmegaConf.merge(merged, layer)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "").partition("[")[0]  # of a list's element the list's
        if key not in describe(schema):
            raise UsageError(f"{where}: {str(error).splitlines()[0]}") from None
        raise UsageError(_wrong_type(schema, key, given.get(key), where)) from None


def _wrong_type(schema: type, key: str, value: Any, where: str) -> str:
    kind, default, _ = describe(schema)[key]
    words = [text for name, text in _IN_WORDS.items() if name in kind.replace("[", " ").split()]
    if kind.startswith("["):
        example = ",".join(map(str, default)) if default else "a,b,..."
        words = [f"a list such as {key}=[{example}], with commas and without spaces"]
    got = "null" if value is None else json.dumps(value, default=str)
    return f"{where}: {key} takes {kind}, {', '.join(words)}; got {got}"


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
    except OSError as error:
        if error.errno is not None:
            raise
        layer = None  # a number, say, of which OmegaConf makes nothing
    except Exception as error:  # for tags that do not fit their values PyYAML raises nearly anything
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(layer):
        raise UsageError(f"{path} must hold `key: value` settings")
    return layer


def _read_override(schema: type, text: str) -> Any:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f"{text!r} is not of the form key=value; words with spaces in them need quotes")
    inner, name = _inside(schema, key)
    kind, _, help_line = describe(inner).get(name, ("", None, ""))
    if not value.strip():
        wanted = f"; {key} takes {kind}: {help_line}" if kind else ""
        none = f"; for none write {key}=null" if kind.endswith("null") and not kind.startswith("str") else ""
        raise UsageError(f"{text!r} gives no value, as of a shell's variable that is not set{wanted}{none}")
    if kind.startswith("str") and value != "null":
        value = os.path.expanduser(value)  # no shell does so after key=
        text = f"{key}={json.dumps(value)}"  # a folder may be called 007 or *.tar: YAML would see a number, an alias
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:  # see _read_yaml
        if value.count("[") > value.count("]") or value.count("{") > value.count("}"):
            raise UsageError(
                f"{text!r} is cut short, as the shell splits words at spaces; write a list without them or in quotes: "
                f"'{key}=[64, 96]'"
            ) from None
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
        bare = _bare(key)
        alike = [k for k in known if _bare(k) == bare or _bare(k.rpartition(".")[2]) == _bare(key.rpartition(".")[2])]
        hint = nearest(key, known) if not alike else f" (did you mean {alike[0]!r}?)"
        raise UsageError(f"{where}: unknown setting {key!r}{hint}; --help lists every one")
    if value == "???":  # OmegaConf leaves what was there
        raise UsageError(f"{where}: {whole} is ???, which stands for a value still to be given")
    if known[key][0].startswith("[") and isinstance(value, list) and any(isinstance(v, (list, dict)) for v in value):
        raise UsageError(_wrong_type(schema, key, value, where))


def _bare(key: str) -> str:
    """A key as people write it who take one of - _ . for another."""
    return re.sub(r"[-_. ]", "", key).lower()
