"""The settings that make a model: which of them its family has, and what those left null stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fcmae import config as settings
from fcmae.errors import UsageError
from fcmae.models import find_model, settings_of
from fcmae.schema import Config, ModelConfig
from fcmae.train.run_config import RunConfig

# Settings that are arguments of a model's class; the image size, which may be one number or two, is not among them.
ARGUMENTS = {
    **{f"model.{f.name}": f.name for f in dataclasses.fields(ModelConfig) if f.name not in ("name", "image_size")},
    "sparse.backend": "backend",
    "sparse.grn": "grn",
    "mask.ratio": "mask_ratio",
    "mask.unit": "mask_unit",
    "loss.norm_pix": "norm_pix",
    "loss.norm_window": "norm_window",
    "loss.pca": "pca",
}


def arguments(config: Config) -> dict[str, Any]:
    """What `create_model` is given besides the image size: the settings that the family has and that are not null."""
    has = settings_of(config.model.name)
    values = {argument: _get(config, key) for key, argument in ARGUMENTS.items() if argument in has}
    return {argument: value for argument, value in values.items() if value is not None}


def check(config: Config) -> None:
    """Raises UsageError for an unknown model, or a setting changed from its default that the model does not have."""
    name = config.model.name
    has, fixed, known = settings_of(name), find_model(name).family, settings.describe(Config)
    for key, argument in ARGUMENTS.items():
        value = _get(config, key)
        if argument in has or value in (known[key][1], getattr(fixed, argument, None)):
            continue
        if hasattr(fixed, argument):
            raise UsageError(f"{key}={value} will not do: {name} has {getattr(fixed, argument)}, always")
        own = ", ".join(k for k, a in ARGUMENTS.items() if a in has and k.startswith(key.split(".")[0]))
        hint = f"it has {own}" if own else "leave it out"
        raise UsageError(f"{key}={value} will not do: {name} has no such setting; {hint}")


def fill(config: Config) -> None:
    """Write the model's own value into every setting that was left null and has one."""
    has = settings_of(config.model.name)
    for key, argument in ARGUMENTS.items():
        if _get(config, key) is None and has.get(argument) is not None:
            group, name = key.split(".")
            setattr(getattr(config, group), name, has[argument])


def held(config: RunConfig, values: dict, where: str) -> dict:
    """The settings that an earlier run like `config` wrote down; those that it did not know yet are what they were
    then, their defaults. Raises UsageError when they are of another command."""
    found = settings.override(type(config)(), values, where)
    if isinstance(found, Config):
        fill(found)
    return settings.to_dict(found)


def free(config: RunConfig, keys: Sequence[str]) -> list[str]:
    """Those of `keys` that a run may change as it goes on: not the batch where its images are normalized together."""
    together = isinstance(config, Config) and (config.model.norm == "bn" or config.sparse.grn == "batch")
    return [key for key in keys if not (together and key in ("train.batch_size", "train.accum_steps"))]


def is_named_size(config: Config) -> bool:
    """Whether the encoder is of the size that its name stands for."""
    has, given = settings_of(config.model.name), arguments(config)
    return all(given.get(argument, has[argument]) == has[argument] for argument in find_model(config.model.name).size)


def _get(config: Config, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)
