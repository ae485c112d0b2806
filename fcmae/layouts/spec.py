"""Which model a state dict holds, read from its shapes, and whether it is whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.layouts.positions import fixed_grid, grid_of, squarest
from fcmae.models import CONVNEXTV2_SIZES, VIT_SIZES
from fcmae.models.fcmae import FCMAE
from fcmae.models.mae import MAE


class Told(NamedTuple):
    """What no tensor's shape tells of a ViT, where its file or its user does: attention heads, pixels (H, W)."""

    heads: int | None = None
    decoder_heads: int | None = None
    size: tuple[int, int] | None = None


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
        """The encoder's sizes: equal ones have the same tensors, but for the positions of another image size."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Pixels of an image that the model takes."""

    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Every key that a whole state dict of this model has, with its shape."""

    @property
    def demands(self) -> frozenset[str]:
        """What a layout must hold, as `Layout.holds` says it, or the encoder alone would not be whole."""
        return frozenset()

    @property
    def untold(self) -> list[str]:
        """The options that would tell what a file of more than tensors needs to know, and nobody does."""
        return []

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
    def read(cls, state: dict[str, Tensor], told: Told) -> ConvNextSpec:
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
    """ViT. tokens: patches of the images its positions are for. fc_norm: whether its last norm follows the mean of the
    patches' tokens, instead of being the encoder's. heads, decoder_heads, size: as `Told`, None where nobody knows."""

    patch_size: int
    tokens: int
    dim: int
    depth: int
    fc_norm: bool = False
    heads: int | None = None
    decoder_heads: int | None = None
    size: tuple[int, int] | None = None

    family, title = "vit", "ViT"
    stem = "patch_embed.proj.weight"
    decoder_keys = ("mask_token", "decoder_")
    head_keys = ("head.", "fc_norm.")

    @classmethod
    def read(cls, state: dict[str, Tensor], told: Told) -> VitSpec:
        """From a state dict in this toolkit's layout; KeyError, IndexError or ValueError where that is not possible.

        What is not told: the heads are the published ones of such a width, the size is the one of fixed positions, or
        the square of so many patches, if there is such.
        """
        dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
        inner = {int(key.split(".")[1]) for key in state if key.startswith("decoder_blocks.")}
        tokens = state["pos_embed"].shape[1] - 1
        width = state["mask_token"].shape[-1] if "mask_token" in state else None
        grid = grid_of(told.size, patch_size) if told.size else fixed_grid(state["pos_embed"]) or squarest(tokens)
        if grid[0] * grid[1] != tokens:
            raise ValueError(f"{told.size[0]}x{told.size[1]} pixels are not its {tokens} patches of {patch_size}")
        known = told.size or grid[0] == grid[1] or fixed_grid(state["pos_embed"])
        published = {size[1]: size[3] for size in VIT_SIZES.values()}
        heads = published.get(dim) if told.heads is None else told.heads
        decoder_heads = {512: 16}.get(width) if told.decoder_heads is None else told.decoder_heads
        for name, of, number in (("heads", dim, heads), ("decoder heads", width, decoder_heads)):
            if None not in (of, number) and (number < 1 or of % number):
                raise ValueError(f"a width of {of} does not divide into {number} {name}")
        return cls(
            in_chans=in_chans,
            patch_size=patch_size,
            tokens=tokens,
            dim=dim,
            depth=_count((key.split(".")[1] for key in state if key.startswith("blocks.")), "blocks."),
            decoder=(width, len(inner)) if width else None,
            classes=state["head.weight"].shape[0] if "head.weight" in state else None,
            fc_norm="fc_norm.weight" in state,
            heads=heads,
            decoder_heads=decoder_heads if width else None,
            size=(grid[0] * patch_size, grid[1] * patch_size) if known else None,
        )

    @property
    def name(self) -> str | None:
        for size, (patch, dim, depth, _) in VIT_SIZES.items():
            if (patch, dim, depth) == self.encoder:
                return f"vit_{size}_patch{patch}_224"
        return None

    @property
    def running_heads(self) -> int:
        """The heads, or where nobody knows them some with which a state dict is run and held against another."""
        return self.heads or max(h for h in range(1, max(1, self.dim // 64) + 1) if self.dim % h == 0)

    @property
    def running_decoder_heads(self) -> int:
        return self.decoder_heads or 1

    @property
    def encoder(self) -> tuple:
        return self.patch_size, self.dim, self.depth

    @property
    def image_size(self) -> tuple[int, int]:
        """The size, or where nobody knows it the squarest one of so many patches, with which all of them are run."""
        rows, columns = squarest(self.tokens)
        return self.size or (rows * self.patch_size, columns * self.patch_size)

    @property
    def demands(self) -> frozenset[str]:
        return frozenset({"average"} if self.fc_norm else ())

    @property
    def untold(self) -> list[str]:
        needs = {"--heads N": self.heads, "--image-size H W": self.size}
        if self.decoder:
            needs["--decoder-heads N"] = self.decoder_heads
        return [option for option, value in needs.items() if value is None]

    def __str__(self) -> str:
        said = self._described(f"ViT of width {self.dim}, depth {self.depth} and patches of {self.patch_size}")
        size = f" of {self.size[0]} x {self.size[1]} pixels" if self.size else ""
        average = ", a norm after the mean of its tokens" if self.fc_norm else ""
        return f"{said}, {self.heads or 'unknown'} heads, {self.tokens} patches{size}{average}"

    def shapes(self) -> dict[str, torch.Size]:
        width, blocks = self.decoder or (4, 0)
        with torch.device("meta"):
            state = MAE(
                self.image_size, self.in_chans, self.patch_size, dim=self.dim, depth=self.depth, heads=1,
                decoder_dim=width, decoder_depth=blocks, decoder_heads=1, mask_ratio=0.5,
            ).state_dict()  # fmt: skip
            if self.fc_norm:
                state |= {f"fc_norm.{k}": state.pop(f"norm.{k}") for k in ("weight", "bias")}
            if self.classes:
                state |= {f"head.{k}": x for k, x in nn.Linear(self.dim, self.classes).state_dict().items()}
        return {key: x.shape for key, x in state.items() if self.decoder or self.part(key) != "decoder"}


def read_spec(state: dict[str, Tensor], where: str, told: Told | None = None) -> Spec:
    """The sizes of a state dict in this toolkit's layout; told: what its tensors do not tell.

    Raises UsageError, naming the tensors, when some are missing, too many, or of shapes that do not belong together.
    """
    cls = VitSpec if "cls_token" in state else ConvNextSpec
    try:
        spec = cls.read(state, told or Told())
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
