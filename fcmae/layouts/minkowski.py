"""The encoder in MinkowskiEngine's layout: what the `minkowski` backend trains and the authors' pretraining files hold.

Keys of both layouts start with `encoder.`; everything outside the encoder passes unchanged.
"""

from __future__ import annotations

from torch import Tensor

from fcmae.errors import UsageError
from fcmae.layouts.names import Names

NAMES = Names(
    {
        "encoder.stem.{i}.{p}": "encoder.downsample_layers.0.{i}.{p}",
        "encoder.stages.{s}.downsample.0.{p}": "encoder.downsample_layers.{s}.0.ln.{p}",
        "encoder.stages.{s}.downsample.1.weight": "encoder.downsample_layers.{s}.1.kernel",
        "encoder.stages.{s}.downsample.1.bias": "encoder.downsample_layers.{s}.1.bias",
        "encoder.stages.{s}.blocks.{b}.conv_dw.weight": "encoder.stages.{s}.{b}.dwconv.kernel",
        "encoder.stages.{s}.blocks.{b}.conv_dw.bias": "encoder.stages.{s}.{b}.dwconv.bias",
        "encoder.stages.{s}.blocks.{b}.norm.{p}": "encoder.stages.{s}.{b}.norm.ln.{p}",
        "encoder.stages.{s}.blocks.{b}.mlp.fc1.{p}": "encoder.stages.{s}.{b}.pwconv1.linear.{p}",
        "encoder.stages.{s}.blocks.{b}.mlp.grn.weight": "encoder.stages.{s}.{b}.grn.gamma",
        "encoder.stages.{s}.blocks.{b}.mlp.grn.bias": "encoder.stages.{s}.{b}.grn.beta",
        "encoder.stages.{s}.blocks.{b}.mlp.fc2.{p}": "encoder.stages.{s}.{b}.pwconv2.linear.{p}",
    }
)


def recognises(state: dict[str, Tensor]) -> bool:
    """Whether an encoder in this layout is among these keys."""
    return "encoder.downsample_layers.1.1.kernel" in state


def to_fcmae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values under this toolkit's names and shapes. Raises UsageError for a kernel that is no square."""
    return {NAMES.ours(key) or key: _densified(key, x) if NAMES.ours(key) else x for key, x in state.items()}


def from_fcmae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values as MinkowskiEngine's modules take them."""
    return {NAMES.theirs(key) or key: _sparsified(theirs, x) if (theirs := NAMES.theirs(key)) else x
            for key, x in state.items()}  # fmt: skip


def _densified(key: str, x: Tensor) -> Tensor:
    if not key.endswith(".kernel"):
        return x.flatten() if _is_row(key) else x
    # MinkowskiEngine numbers a kernel's cells with the first spatial axis fastest: transposed against Conv2d.
    side = round(x.shape[0] ** 0.5)
    if side * side != x.shape[0]:
        raise UsageError(f"{key} has {x.shape[0]} kernel cells, which is not a square")
    if x.ndim == 2:  # depthwise (k*k, C)
        return x.T.reshape(-1, 1, side, side).transpose(2, 3).contiguous()
    return x.permute(2, 1, 0).reshape(x.shape[2], x.shape[1], side, side).transpose(2, 3).contiguous()


def _sparsified(key: str, x: Tensor) -> Tensor:
    if not key.endswith(".kernel"):
        return x[None] if _is_row(key) else x
    cells = x.transpose(2, 3).flatten(2)  # (C', C, k*k), C = 1 where depthwise
    return (cells[:, 0].T if key.endswith("dwconv.kernel") else cells.permute(2, 1, 0)).contiguous()


def _is_row(key: str) -> bool:
    """Whether MinkowskiEngine keeps this vector as (1, C): GRN's, and the biases of its own convolutions."""
    own_bias = key.endswith((".dwconv.bias", ".1.bias")) and not key.startswith("encoder.downsample_layers.0.")
    return own_bias or key.endswith((".gamma", ".beta"))
