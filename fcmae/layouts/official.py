"""The authors' FCMAE pretraining checkpoint: its encoder in MinkowskiEngine's layout, its decoder dense."""

from __future__ import annotations

from torch import Tensor

from fcmae.layouts import minkowski
from fcmae.layouts.names import Names

NAMES = Names(
    {
        "decoder.{b}.conv_dw.{p}": "decoder.{b}.dwconv.{p}",
        "decoder.{b}.norm.{p}": "decoder.{b}.norm.{p}",
        "decoder.{b}.mlp.fc1.{p}": "decoder.{b}.pwconv1.{p}",
        "decoder.{b}.mlp.grn.weight": "decoder.{b}.grn.gamma",
        "decoder.{b}.mlp.grn.bias": "decoder.{b}.grn.beta",
        "decoder.{b}.mlp.fc2.{p}": "decoder.{b}.pwconv2.{p}",
    }
)


def recognises(state: dict[str, Tensor]) -> bool:
    """Whether these are the keys of the authors' FCMAE pretraining class."""
    return minkowski.recognises(state) and "proj.weight" in state and state["proj.weight"].ndim == 4


def to_fcmae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that `FCMAE.load_state_dict(strict=True)` takes. Raises UsageError for a tensor of odd shape."""
    state = {NAMES.ours(key) or key: _reshaped(key, x) for key, x in state.items()}
    return minkowski.to_fcmae(state)


def _reshaped(key: str, x: Tensor) -> Tensor:
    if key == "mask_token":  # (1, D, 1, 1)
        return x.movedim(1, -1).contiguous()
    if key in ("proj.weight", "pred.weight"):  # 1x1 convolutions
        return x.flatten(1)
    if key.startswith("decoder.") and key.endswith((".gamma", ".beta")):  # (1, 1, 1, C)
        return x.flatten()
    return x
