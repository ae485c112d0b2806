"""The authors' FCMAE pretraining checkpoint (MinkowskiEngine encoder, dense decoder) in this toolkit's names."""

from __future__ import annotations

import re

from torch import Tensor

from fcmae.errors import UsageError

# Names, most specific first. Block parameters are the same in encoder and decoder.
_RENAMES = [
    (r"^encoder\.downsample_layers\.0\.(\d)\.", r"encoder.stem.\1."),
    (r"^encoder\.downsample_layers\.([1-3])\.(\d)\.", r"encoder.stages.\1.downsample.\2."),
    (r"^encoder\.stages\.(\d)\.(\d+)\.", r"encoder.stages.\1.blocks.\2."),
    (r"\.(ln|linear)\.", "."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv1\.", ".mlp.fc1."),
    (r"\.pwconv2\.", ".mlp.fc2."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"\.kernel$", ".weight"),
]


def recognises(state: dict[str, Tensor]) -> bool:
    """Whether these are the keys of the authors' FCMAE pretraining class."""
    return "encoder.downsample_layers.0.0.weight" in state and "mask_token" in state


def to_fcmae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that `FCMAE.load_state_dict(strict=True)` takes. Raises UsageError for a tensor of odd shape."""
    return {_rename(key): _reshape(key, value) for key, value in state.items()}


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _reshape(key: str, x: Tensor) -> Tensor:
    if key == "mask_token":  # (1, D, 1, 1)
        return x.movedim(1, -1).contiguous()
    if key.endswith(".kernel"):
        # MinkowskiEngine numbers a kernel's cells with the first spatial axis fastest: transposed against Conv2d.
        side = round(x.shape[0] ** 0.5)
        if side * side != x.shape[0]:
            raise UsageError(f"{key} has {x.shape[0]} kernel cells, which is not a square")
        if x.ndim == 2:  # depthwise (k*k, C)
            return x.T.reshape(-1, 1, side, side).transpose(2, 3).contiguous()
        return x.permute(2, 1, 0).reshape(x.shape[2], x.shape[1], side, side).transpose(2, 3).contiguous()
    if key in ("proj.weight", "pred.weight"):  # 1x1 convolutions
        return x.flatten(1)
    if key.endswith((".bias", ".gamma", ".beta")):  # (1, C) and (1, 1, 1, C)
        return x.flatten()
    return x
