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
VARIANTS = ("encoder_mask_token", "target.mean", "target.basis")  # of this toolkit alone
# A classifier on the class token, or with `fc_norm` in the place of `norm` on the mean of the patches' tokens.
HEAD = ("head.{p}", "fc_norm.{p}")

_WHOLE, _VIT = ("cls_token", "decoder_embed.weight"), ("cls_token", "patch_embed.proj.weight", "pos_embed")
_TERMS = "under CC BY-NC 4.0: not for commercial use"


class OfficialLayout(Layout):
    """Has no place for this toolkit's variants."""

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return super().recognises(state) and not any(key in state for key in VARIANTS)


def _layout(
    name: str, text: str, keys: tuple[str, ...], holds: set[str], marks: tuple[str, ...], licence="", cls=Layout
) -> Layout:
    names = Names({key: key for key in keys})
    return cls(name, text, names, marks=marks, holds=frozenset(holds), family="vit", licence=licence)


FCMAE = _layout(
    "fcmae", "this toolkit", (*ENCODER, *DECODER, *VARIANTS, *HEAD), {"decoder", "head", "average", "variants"}, _WHOLE
)
OFFICIAL = _layout(
    "official", "the authors' MAE pretraining", (*ENCODER, *DECODER), {"decoder"}, _WHOLE,
    f"the authors' published MAE weights are {_TERMS}", OfficialLayout,
)  # fmt: skip
TIMM = _layout(
    "timm", "timm's ViT", (*ENCODER, *HEAD), {"head", "average"}, _VIT,
    f"the authors' published MAE encoders and fine-tuned models, which have this layout too, are {_TERMS}",
)  # fmt: skip


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict, under timm's names as it is."""
    return {key: x for key, x in state.items() if TIMM.names.theirs(key) and not key.startswith(("head.", "fc_norm."))}
