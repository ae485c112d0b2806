"""timm's `convnextv2_*`, which with `use_grn=False, ls_init_value=1e-6` are of ConvNeXt V1's blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.layouts import mae
from fcmae.layouts.layout import Layout
from fcmae.layouts.minkowski import LAYOUT as MINKOWSKI
from fcmae.layouts.names import Names

NAMES = Names(
    {
        "encoder.stem.{i}.{p}": "stem.{i}.{p}",
        "encoder.stages.{s}.downsample.{i}.{p}": "stages.{s}.downsample.{i}.{p}",
        "encoder.stages.{s}.blocks.{b}.conv_dw.{p}": "stages.{s}.blocks.{b}.conv_dw.{p}",
        "encoder.stages.{s}.blocks.{b}.norm.{p}": "stages.{s}.blocks.{b}.norm.{p}",
        "encoder.stages.{s}.blocks.{b}.mlp.fc1.{p}": "stages.{s}.blocks.{b}.mlp.fc1.{p}",
        "encoder.stages.{s}.blocks.{b}.mlp.grn.{p}": "stages.{s}.blocks.{b}.mlp.grn.{p}",
        # timm has no ConvNeXt with this norm, but its MLP has such a place: it names what a run exports.
        "encoder.stages.{s}.blocks.{b}.mlp.norm.{p}": "stages.{s}.blocks.{b}.mlp.norm.{p}",
        "encoder.stages.{s}.blocks.{b}.mlp.fc2.{p}": "stages.{s}.blocks.{b}.mlp.fc2.{p}",
        "encoder.stages.{s}.blocks.{b}.gamma": "stages.{s}.blocks.{b}.gamma",
        "norm.{p}": "head.norm.{p}",
        "head.{p}": "head.fc.{p}",
    }
)

# timm builds its four smallest sizes with 1x1 convolutions in the MLP, the others with linear layers.
CONV_MLP_DIMS = {40, 48, 64, 80}


def _ours(key: str, x: Tensor) -> Tensor:
    return x.flatten(1) if key.endswith((".fc1.weight", ".fc2.weight")) else x


class TimmLayout(Layout):
    """The MLP's weights are (4C, C, 1, 1) in the small sizes, which the stem's width tells."""

    def from_fcmae(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        small = "encoder.stem.0.bias" in state and state["encoder.stem.0.bias"].numel() in CONV_MLP_DIMS
        wide = small and (".fc1.weight", ".fc2.weight")
        made = super().from_fcmae(state)
        return {key: x[:, :, None, None] if wide and key.endswith(wide) else x for key, x in made.items()}


def with_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model of ours, and the norm that timm's and transformers' models end with, if it has none: weight 1 and bias 0.

    FCMAE pretrains without it; so does fine-tuning begin in the authors' code.
    """
    if "norm.weight" in state:
        return state
    last = max(int(key.split(".")[2]) for key in state if key.startswith("encoder.stages."))
    width = state[f"encoder.stages.{last}.blocks.0.norm.weight"]
    return state | {"norm.weight": torch.ones_like(width), "norm.bias": torch.zeros_like(width)}


def from_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors of the encoder in a model's state dict, of either family; on the CPU, contiguous."""
    if mae.FCMAE.recognises(state):
        return {key: x.detach().cpu().contiguous() for key, x in mae.encoder_of(state).items()}
    state = MINKOWSKI.to_fcmae(state)
    encoder = {key: x.detach().cpu() for key, x in state.items() if key.startswith("encoder.")}
    return {key: x.contiguous() for key, x in LAYOUT.from_fcmae(with_norm(encoder)).items()}


LAYOUT = TimmLayout(
    "timm",
    "timm's ConvNeXt V2",
    NAMES,
    marks=("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
    ours=_ours,
    holds=frozenset({"head", "layer_scale"}),
    ends_in_norm=True,
)
