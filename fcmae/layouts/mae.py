"""MAE's ViT: the names of this toolkit are the authors', and in the encoder timm's."""

from __future__ import annotations

from torch import Tensor

from fcmae.layouts.layout import Layout
from fcmae.layouts.names import Names

ENCODER = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.{p}",
    "blocks.{b}.{m}.{p}",
    "blocks.{b}.{m}.{n}.{p}",
    "norm.{p}",
)
DECODER = (
    "mask_token",
    "decoder_pos_embed",
    "decoder_embed.{p}",
    "decoder_blocks.{b}.{m}.{p}",
    "decoder_blocks.{b}.{m}.{n}.{p}",
    "decoder_norm.{p}",
    "decoder_pred.{p}",
)
HEAD = ("head.{p}",)


def _layout(name: str, text: str, keys: tuple[str, ...], holds: set[str], marks: tuple[str, ...]) -> Layout:
    return Layout(name, text, Names({key: key for key in keys}), marks=marks, holds=frozenset(holds), family="vit")


FCMAE = _layout(
    "fcmae", "this toolkit", (*ENCODER, *DECODER, *HEAD), {"decoder", "head"}, ("cls_token", "decoder_embed.weight")
)
OFFICIAL = _layout("official", "the authors' MAE pretraining", (*ENCODER, *DECODER), {"decoder"}, FCMAE.marks)
TIMM = _layout("timm", "timm's ViT", (*ENCODER, *HEAD), {"head"}, ("cls_token", "patch_embed.proj.weight", "pos_embed"))


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict, under timm's names as it is."""
    return {key: x for key, x in state.items() if TIMM.names.theirs(key) and not key.startswith("head.")}
