"""MAE's state dict: this toolkit's, the authors' pretraining file's and, in its encoder, timm's `vit_*` alike."""

from __future__ import annotations

from torch import Tensor


def recognises(state: dict[str, Tensor]) -> bool:
    """Whether these are the keys of MAE, encoder and decoder."""
    return "cls_token" in state and "decoder_embed.weight" in state


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part, under timm's names as it is."""
    return {key: x for key, x in state.items() if not key.startswith("decoder_") and key != "mask_token"}
