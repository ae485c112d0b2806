"""The encoder in MinkowskiEngine's layout: of the `minkowski` backend and of the authors' pretraining files."""

from __future__ import annotations

from torch import Tensor

from fcmae.errors import UsageError
from fcmae.layouts.fcmae import DECODER, DECODER_BLOCKS, HEAD, TARGET, VIT_DECODER
from fcmae.layouts.layout import Layout
from fcmae.layouts.names import Names

ENCODER = {
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


def densified(key: str, x: Tensor) -> Tensor:
    """The tensor of one of the encoder's keys in this layout, as PyTorch's own modules shape it."""
    if not key.endswith(".kernel"):
        return x.flatten() if _is_row(key) else x
    # MinkowskiEngine numbers a kernel's cells with the first spatial axis fastest: transposed against Conv2d.
    side = round(x.shape[0] ** 0.5)
    if side * side != x.shape[0]:
        raise UsageError(f"{key} has {x.shape[0]} kernel cells, which is not a square")
    if x.ndim == 2:  # depthwise (k*k, C)
        return x.T.reshape(-1, 1, side, side).transpose(2, 3).contiguous()
    return x.permute(2, 1, 0).reshape(x.shape[2], x.shape[1], side, side).transpose(2, 3).contiguous()


def sparsified(key: str, x: Tensor) -> Tensor:
    """The inverse of `densified`."""
    if not key.endswith(".kernel"):
        return x[None] if _is_row(key) else x
    cells = x.transpose(2, 3).flatten(2)  # (C', C, k*k), C = 1 where depthwise
    return (cells[:, 0].T if key.endswith("dwconv.kernel") else cells.permute(2, 1, 0)).contiguous()


def _is_row(key: str) -> bool:
    """Whether MinkowskiEngine keeps this vector as (1, C): GRN's, and the biases of its own convolutions."""
    if not key.startswith("encoder."):
        return False
    own_bias = key.endswith((".dwconv.bias", ".1.bias")) and not key.startswith("encoder.downsample_layers.0.")
    return own_bias or key.endswith((".gamma", ".beta"))


LAYOUT = Layout(
    "minkowski",
    "MinkowskiEngine's encoder",
    Names(ENCODER | {key: key for key in (*DECODER, *DECODER_BLOCKS, *VIT_DECODER, *TARGET, *HEAD)}),
    marks=("encoder.downsample_layers.1.1.kernel",),
    ours=densified,
    theirs=sparsified,
    holds=frozenset({"decoder", "head", "variants"}),
)
