"""The sizes of a model as its state dict tells them, whichever family it is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch


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
    pca: int | None = None  # principal components that the decoder predicts, None: pixels
    classes: int | None = None
    decoder_heads: int | None = None  # None where nobody knows them, or there is no attention

    family: ClassVar[str]  # as `Layout.family`
    title: ClassVar[str]
    stem: ClassVar[str]  # the weight that sees the channels
    decoder_keys: ClassVar[tuple[str, ...]]  # beginnings of the decoder's keys
    head_keys: ClassVar[tuple[str, ...]]  # and of the classifier's
    decoder_text = "decoder"

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

    def demands(self, with_decoder: bool) -> dict[str, str]:
        """What a layout must hold, as `Layout.holds` says it, or what goes into it would not be whole; and in words."""
        return {"variants": f"a target of {self.pca} principal components"} if with_decoder and self.pca else {}

    @property
    def pretraining(self) -> tuple:
        """What two models have in common that have the same decoder, but for attention heads."""
        return self.decoder, self.pca

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
            parts.append(f"{self.decoder_text} of {self.decoder[1]} x {self.decoder[0]}")
        if self.pca:
            parts.append(f"{self.pca} principal components")
        if self.classes:
            parts.append(f"classifier of {self.classes}")
        return ", ".join(parts)


def count_blocks(numbers: Iterable[str], what: str) -> int:
    """How many blocks there are, which must be numbered from 0 without a gap."""
    found = sorted({int(number) for number in numbers})
    if not found or found != list(range(len(found))):
        raise ValueError(f"{what}* are not numbered 0, 1, 2, ... but {found[:4] or 'missing'}")
    return len(found)
