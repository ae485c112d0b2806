"""Which ConvNeXt V2 a state dict holds, read from its shapes, and whether it is whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.models import CONVNEXTV2_SIZES
from fcmae.models.fcmae import FCMAE


@dataclass(frozen=True)
class Spec:
    """The sizes of a model: encoder, and where they are there decoder and classifier."""

    in_chans: int
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    decoder: tuple[int, int] | None = None  # width, blocks
    norm: bool = False
    classes: int | None = None

    @property
    def name(self) -> str | None:
        """The published size's name as timm has it, such as `convnextv2_atto`; None for any other size."""
        for size, (depths, dims) in CONVNEXTV2_SIZES.items():
            if (self.depths, self.dims) == (depths, dims):
                return f"convnextv2_{size}"
        return None

    def __str__(self) -> str:
        parts = [self.name or f"ConvNeXt V2 of depths {list(self.depths)} and dims {list(self.dims)}"]
        parts.append(f"{self.in_chans} channels")
        if self.decoder:
            parts.append(f"decoder of {self.decoder[1]} x {self.decoder[0]}")
        if self.classes:
            parts.append(f"classifier of {self.classes}")
        return ", ".join(parts)

    def model(self, **settings) -> FCMAE:
        """An FCMAE of these sizes, with `settings` besides."""
        width, blocks = self.decoder or (8, 0)
        sizes = {"in_chans": self.in_chans, "depths": self.depths, "dims": self.dims}
        return FCMAE(**sizes, decoder_dim=width, decoder_depth=blocks, **settings)

    def shapes(self) -> dict[str, torch.Size]:
        """Every key that a whole state dict of this model has, with its shape."""
        with torch.device("meta"):
            state = self.model().state_dict()
            if self.norm:
                state |= {f"norm.{k}": v for k, v in nn.LayerNorm(self.dims[-1]).state_dict().items()}
            if self.classes:
                state |= {f"head.{k}": v for k, v in nn.Linear(self.dims[-1], self.classes).state_dict().items()}
        wanted = ("encoder.", "norm.", "head.") if self.decoder is None else ("",)
        return {key: x.shape for key, x in state.items() if key.startswith(wanted)}


def read_spec(state: dict[str, Tensor], where: str) -> Spec:
    """The sizes of a state dict in this toolkit's layout.

    Raises UsageError, naming the tensors, when some are missing, too many, or of shapes that do not belong together.
    """
    try:
        dims = tuple(state[f"encoder.stages.{i}.blocks.0.conv_dw.weight"].shape[0] for i in range(4))
        depths = tuple(
            1 + max(int(key.split(".")[4]) for key in state if key.startswith(f"encoder.stages.{i}.blocks."))
            for i in range(4)
        )
        decoder = None
        if "mask_token" in state:
            blocks = {key.split(".")[1] for key in state if key.startswith("decoder.")}
            decoder = (state["mask_token"].shape[-1], len(blocks))
        classes = state["head.weight"].shape[0] if "head.weight" in state else None
        norm = any(key.startswith("norm.") for key in state)
        spec = Spec(state["encoder.stem.0.weight"].shape[1], depths, dims, decoder, norm, classes)
        wanted = spec.shapes()
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"{where} holds no whole ConvNeXt V2 encoder: {error} is missing or odd") from None
    missing = sorted(wanted.keys() - state.keys())
    extra = sorted(state.keys() - wanted.keys())
    odd = [
        f"{key} is {tuple(state[key].shape)} where {tuple(shape)} belongs"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    faults = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in
              (("missing", missing), ("unknown", extra), ("of another size", odd)) if keys]  # fmt: skip
    if faults:
        raise UsageError(f"{where} is no whole {spec.name or 'ConvNeXt V2'}: {'; '.join(faults)}")
    return spec


def _some(names: list[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
