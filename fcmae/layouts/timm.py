"""The encoder as timm's `convnextv2_*` or `vit_*` state dict (without a classifier)."""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.layouts import mae

# timm builds its four smallest sizes with 1x1 convolutions in the MLP, the others with linear layers.
_CONV_MLP_DIMS = {40, 48, 64, 80}


def from_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors from the state dict of a whole model of either family."""
    encoder = encoder_of(state)
    if mae.recognises(state):
        return {key: value.detach().cpu().contiguous() for key, value in encoder.items()}
    return from_encoder(encoder)


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict, as `FCMAE.encoder`, or timm's ViT, names it."""
    if mae.recognises(state):
        return mae.encoder_of(state)
    return {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}


def from_encoder(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors from the state dict of `FCMAE.encoder`; float32 or whatever the source has, contiguous.

    FCMAE has no final norm; timm's `head.norm` starts fine-tuning as the authors' does, weight 1 and bias 0.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.items()}
    if state["stem.0.bias"].numel() in _CONV_MLP_DIMS:
        for key in [k for k in state if k.endswith(("mlp.fc1.weight", "mlp.fc2.weight"))]:
            state[key] = state[key][:, :, None, None]
    last = max(int(key.split(".")[1]) for key in state if key.startswith("stages."))
    width = state[f"stages.{last}.blocks.0.norm.weight"]
    state["head.norm.weight"], state["head.norm.bias"] = torch.ones_like(width), torch.zeros_like(width)
    return state
