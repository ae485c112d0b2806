"""The models by name."""

from __future__ import annotations

from torch import nn

from fcmae.errors import UsageError, nearest
from fcmae.models.fcmae import FCMAE

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

MODELS = {f"fcmae_convnextv2_{size}": (FCMAE, {"depths": d, "dims": w}) for size, (d, w) in CONVNEXTV2_SIZES.items()}


def create_model(name: str, **settings) -> nn.Module:
    """A model by name, e.g. `fcmae_convnextv2_atto`; `settings` go to its class and override the name's own.

    Raises UsageError listing near names when there is no such model.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}{nearest(name, MODELS)}; known: {', '.join(MODELS)}")
    cls, defaults = MODELS[name]
    return cls(**{**defaults, **settings})
