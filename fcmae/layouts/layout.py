"""What a layout is: names, shapes, and how to tell it by its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fcmae.errors import UsageError
from fcmae.layouts.names import Names

State = dict[str, Tensor]


def unchanged(key: str, x: Tensor) -> Tensor:
    """The shape rule of a layout whose tensors are shaped as ours."""
    return x


@dataclass(frozen=True)
class Layout:
    """How other code names and shapes the tensors that this toolkit trains.

    name: as `--to` takes it. text: whose it is. names: our keys and theirs; ours(their key, tensor) and
    theirs(their key, tensor) give the other side's shape, permuting elements at most. marks: keys that, together, only
    this layout has. holds: what it has a place for besides the encoder: "decoder", "head", "average", a ViT's head on
    the mean of its tokens, "layer_scale", ConvNeXt V1's blocks, "norms", those with other norms, "variants" of decoder
    and target, and "skips", a decoder that uses them. family: "convnext" or "vit". ends_in_norm: its models have a norm
    after the encoder, classifier or not. licence: what to say of published weights that come in it.
    """

    name: str
    text: str
    names: Names
    marks: tuple[str, ...]
    ours: Callable[[str, Tensor], Tensor] = unchanged
    theirs: Callable[[str, Tensor], Tensor] = unchanged
    holds: frozenset[str] = frozenset()
    family: str = "convnext"
    ends_in_norm: bool = False
    licence: str = ""

    def recognises(self, state: State) -> bool:
        """Whether the keys are this layout's."""
        return all(mark in state for mark in self.marks)

    def whole(self, key: str) -> str:
        """Our key that one of theirs is, or is a part of; the same where the layout does not know it."""
        return self.names.ours(key) or key

    def parts(self, key: str) -> tuple[str, ...]:
        """Their keys that one of ours is made of, several where they keep it in parts; the same where unknown."""
        return (self.names.theirs(key) or key,)

    def to_fcmae(self, state: State) -> State:
        """The same values under this toolkit's names and shapes; keys that the layout does not know stay.

        Raises UsageError for a tensor with another number of dimensions than the layout's.
        """
        return {self.names.ours(key) or key: self._ours(key, x) for key, x in state.items()}

    def _ours(self, key: str, x: Tensor) -> Tensor:
        try:
            return self.ours(key, x) if self.names.ours(key) else x
        except (IndexError, RuntimeError) as error:
            raise UsageError(f"{key} of shape {tuple(x.shape)} does not belong into the {self.name} layout") from error

    def from_fcmae(self, state: State) -> State:
        """The same values in this layout; keys that it has no name for stay."""
        known = {key: self.names.theirs(key) for key in state}
        return {known[key] or key: self.theirs(known[key], x) if known[key] else x for key, x in state.items()}
