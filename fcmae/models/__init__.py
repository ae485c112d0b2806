"""The models by name."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from fcmae.errors import UsageError, nearest
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.fcmae import FCMAE
from fcmae.models.mae import MAE

# The eight published sizes (arXiv 2301.00808 §5 and the authors' repository): blocks and widths of the four stages.
CONVNEXTV2_SIZES = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}

# Base, large and huge as published (arXiv 2111.06377), the other two DeiT's: patch, width, blocks, attention heads.
VIT_SIZES = {
    "tiny": (16, 192, 12, 3),
    "small": (16, 384, 12, 6),
    "base": (16, 768, 12, 12),
    "large": (16, 1024, 24, 16),
    "huge": (14, 1280, 32, 16),
}


class Named(NamedTuple):
    """What a name stands for: the class, the settings that make the size, and what timm calls the encoder."""

    family: type[MaskedAutoencoder]
    size: dict[str, Any]
    timm: str


MODELS = {
    f"fcmae_convnextv2_{size}": Named(FCMAE, {"depths": depths, "dims": dims}, f"convnextv2_{size}")
    for size, (depths, dims) in CONVNEXTV2_SIZES.items()
} | {
    f"mae_vit_{size}_patch{patch}": Named(
        MAE, {"patch_size": patch, "dim": dim, "depth": depth, "heads": heads}, f"vit_{size}_patch{patch}_224"
    )
    for size, (patch, dim, depth, heads) in VIT_SIZES.items()
}


def find_model(name: str) -> Named:
    """The entry of a name. Raises UsageError listing near names when there is no such model."""
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}{nearest(name, MODELS)}; known: {', '.join(MODELS)}")
    return MODELS[name]


def settings_of(name: str) -> dict[str, Any]:
    """Every setting of a named model and its value when left out, sequences as lists."""
    named = find_model(name)
    own = {key: p.default for key, p in inspect.signature(named.family).parameters.items()} | named.size
    return {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}


def create_model(name: str, **settings) -> MaskedAutoencoder:
    """A model by name, e.g. `fcmae_convnextv2_atto`; `settings` go to its class and override the name's own.

    Raises UsageError listing near names when there is no such model.
    """
    named = find_model(name)
    return named.family(**{**named.size, **settings})
