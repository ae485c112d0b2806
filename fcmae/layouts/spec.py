"""Which model a state dict holds, read from its shapes, and whether it is whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.models import CONVNEXTV2_SIZES, VIT_SIZES
from fcmae.models.fcmae import FCMAE
from fcmae.models.mae import MAE


@dataclass(frozen=True, kw_only=True)
class Spec(ABC):
    """The sizes of a model: encoder, and where they are there decoder (width, blocks) and classifier."""

    in_chans: int
    decoder: tuple[int, int] | None = None
    classes: int | None = None

    family: ClassVar[str]  # as `Layout.family`
    title: ClassVar[str]
    stem: ClassVar[str]  # the weight that sees the channels
    decoder_keys: ClassVar[tuple[str, ...]]  # beginnings of the decoder's keys
    head_keys: ClassVar[tuple[str, ...]]  # and of the classifier's

    @property
    @abstractmethod
    def name(self) -> str | None:
        """timm's name of the encoder, such as `convnextv2_atto`; None for a size without a name."""

    @property
    @abstractmethod
    def encoder(self) -> tuple:
        """The encoder's sizes: equal ones have the same tensors."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Pixels of an image that the model takes."""

    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Every key that a whole state dict of this model has, with its shape."""

    def part(self, key: str) -> str:
        """Where a key belongs: "encoder", "decoder" or "head"."""
        if key.startswith(self.decoder_keys):
            return "decoder"
        return "head" if key.startswith(self.head_keys) else "encoder"

    def _described(self, encoder: str) -> str:
        parts = [self.name or encoder, f"{self.in_chans} channels"]
        if self.decoder:
            parts.append(f"decoder of {self.decoder[1]} x {self.decoder[0]}")
        if self.classes:
            parts.append(f"classifier of {self.classes}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class ConvNextSpec(Spec):
    """ConvNeXt V2. norm: whether there is a norm after the encoder, which FCMAE does without."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    norm: bool = False

    family, title = "convnext", "ConvNeXt V2"
    stem = "encoder.stem.0.weight"
    decoder_keys = ("proj.", "mask_token", "decoder.", "pred.")
    head_keys = ("norm.", "head.")
    image_size = (64, 96)

    @classmethod
    def read(cls, state: dict[str, Tensor]) -> ConvNextSpec:
        """From a state dict in this toolkit's layout; KeyError, IndexError or ValueError where that is not possible."""
        depths = []
        for i in range(4):
            stage = f"encoder.stages.{i}.blocks."
            depths.append(_count((key.split(".")[4] for key in state if key.startswith(stage)), stage))
        blocks = {key.split(".")[1] for key in state if key.startswith("decoder.")}
        norm = any(key.startswith("norm.") for key in state)
        if "head.weight" in state and not norm:
            raise ValueError("a classifier without the norm that comes before it")
        return cls(
            in_chans=state["encoder.stem.0.weight"].shape[1],
            depths=tuple(depths),
            dims=tuple(state[f"encoder.stages.{i}.blocks.0.conv_dw.weight"].shape[0] for i in range(4)),
            decoder=(state["mask_token"].shape[-1], len(blocks)) if "mask_token" in state else None,
            norm=norm,
            classes=state["head.weight"].shape[0] if "head.weight" in state else None,
        )

    @property
    def name(self) -> str | None:
        names = {sizes: f"convnextv2_{size}" for size, sizes in CONVNEXTV2_SIZES.items()}
        return names.get(self.encoder)

    @property
    def encoder(self) -> tuple:
        return self.depths, self.dims

    def __str__(self) -> str:
        return self._described(f"ConvNeXt V2 of depths {list(self.depths)} and dims {list(self.dims)}")

    def shapes(self) -> dict[str, torch.Size]:
        width, blocks = self.decoder or (8, 0)
        with torch.device("meta"):
            state = FCMAE(
                in_chans=self.in_chans, depths=self.depths, dims=self.dims, decoder_dim=width, decoder_depth=blocks
            ).state_dict()
            if self.norm:
                state |= {f"norm.{k}": x for k, x in nn.LayerNorm(self.dims[-1]).state_dict().items()}
            if self.classes:
                state |= {f"head.{k}": x for k, x in nn.Linear(self.dims[-1], self.classes).state_dict().items()}
        return {key: x.shape for key, x in state.items() if self.decoder or self.part(key) != "decoder"}


@dataclass(frozen=True, kw_only=True)
class VitSpec(Spec):
    """ViT. tokens: patches of the images its positions are for."""

    patch_size: int
    tokens: int
    dim: int
    depth: int

    family, title = "vit", "ViT"
    stem = "patch_embed.proj.weight"
    decoder_keys = ("mask_token", "decoder_")
    head_keys = ("head.",)

    @classmethod
    def read(cls, state: dict[str, Tensor]) -> VitSpec:
        """From a state dict in this toolkit's layout; KeyError, IndexError or ValueError where that is not possible."""
        dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
        inner = {int(key.split(".")[1]) for key in state if key.startswith("decoder_blocks.")}
        return cls(
            in_chans=in_chans,
            patch_size=patch_size,
            tokens=state["pos_embed"].shape[1] - 1,
            dim=dim,
            depth=_count((key.split(".")[1] for key in state if key.startswith("blocks.")), "blocks."),
            decoder=(state["mask_token"].shape[-1], len(inner)) if "mask_token" in state else None,
            classes=state["head.weight"].shape[0] if "head.weight" in state else None,
        )

    @property
    def name(self) -> str | None:
        for size, (patch, dim, depth, _) in VIT_SIZES.items():
            if (patch, dim, depth) == (self.patch_size, self.dim, self.depth):
                return f"vit_{size}_patch{patch}_224"
        return None

    @property
    def heads(self) -> int:
        """Attention heads, which no tensor's shape tells: the published size's, or one for every 64 channels."""
        for _, dim, _, heads in VIT_SIZES.values():
            if dim == self.dim:
                return heads
        return max(h for h in range(1, max(1, self.dim // 64) + 1) if self.dim % h == 0)

    @property
    def encoder(self) -> tuple:
        return self.patch_size, self.tokens, self.dim, self.depth

    @property
    def image_size(self) -> tuple[int, int]:
        """The squarest image of so many patches: no tensor tells a rectangle's sides."""
        rows = max(n for n in range(1, int(self.tokens**0.5) + 1) if self.tokens % n == 0)
        return rows * self.patch_size, self.tokens // rows * self.patch_size

    def __str__(self) -> str:
        sizes = f"ViT of width {self.dim}, depth {self.depth} and patches of {self.patch_size}"
        return self._described(sizes) + f", {self.tokens} patches"

    def shapes(self) -> dict[str, torch.Size]:
        width, blocks = self.decoder or (4, 0)
        with torch.device("meta"):
            state = MAE(
                self.image_size, self.in_chans, self.patch_size, dim=self.dim, depth=self.depth, heads=1,
                decoder_dim=width, decoder_depth=blocks, decoder_heads=1,
            ).state_dict()  # fmt: skip
            if self.classes:
                state |= {f"head.{k}": x for k, x in nn.Linear(self.dim, self.classes).state_dict().items()}
        return {key: x.shape for key, x in state.items() if self.decoder or self.part(key) != "decoder"}


def read_spec(state: dict[str, Tensor], where: str) -> Spec:
    """The sizes of a state dict in this toolkit's layout.

    Raises UsageError, naming the tensors, when some are missing, too many, or of shapes that do not belong together.
    """
    cls = VitSpec if "cls_token" in state else ConvNextSpec
    try:
        spec = cls.read(state)
        wanted = spec.shapes()
    except (KeyError, IndexError, ValueError, TypeError) as error:
        what = f"{error} is not there" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{where} holds no whole {cls.title} encoder: {what}") from None
    faults = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unknown": sorted(state.keys() - wanted.keys()),
        "of another size": [
            f"{key} is {tuple(state[key].shape)} where {tuple(shape)} belongs"
            for key, shape in wanted.items()
            if key in state and state[key].shape != shape
        ],
    }
    said = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in faults.items() if keys]
    if said:
        raise UsageError(f"{where} is no whole {spec.name or spec.title}: {'; '.join(said)}")
    return spec


def _count(numbers: Iterable[str], what: str) -> int:
    """How many blocks there are, which must be numbered from 0 without a gap."""
    found = sorted({int(number) for number in numbers})
    if not found or found != list(range(len(found))):
        raise ValueError(f"{what}* are not numbered 0, 1, 2, ... but {found[:4] or 'missing'}")
    return len(found)


def _some(names: list[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
