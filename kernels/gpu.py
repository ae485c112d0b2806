"""The Triton kernels for the GPU, with the functions of `reference`; what they do not take goes to the reference.

Imported, and Triton with it, only where a tensor on a GPU asks for it.
"""

from __future__ import annotations

import sys

from torch import Tensor

from fcmae.kernels import reference, triton_norm, triton_rows
from fcmae.kernels.tiles import STORAGE
from fcmae.kernels.triton_conv import tile_conv, tile_conv_weight_grad

__all__ = ["gelu_grn", "gelu_grn_backward", "layer_norm_backward", "mlp_groups", "tile_conv", "tile_conv_weight_grad"]


def gelu_grn(h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, z: Tensor) -> Tensor:
    """`reference.gelu_grn` in Triton."""
    kernels = triton_rows if _takes(h) else reference
    return kernels.gelu_grn(h, bias, gamma, beta, z)


def gelu_grn_backward(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, squares: Tensor, grad: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.gelu_grn_backward` in Triton."""
    kernels = triton_rows if _takes(h) else reference
    return kernels.gelu_grn_backward(h, bias, gamma, beta, squares, grad, z)


def layer_norm_backward(
    grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, normed: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.layer_norm_backward` in Triton."""
    kernels = triton_norm if _takes(y) and y.shape[1] <= triton_norm.WIDEST else reference
    return kernels.layer_norm_backward(grad, y, mean, rstd, weight, bias, dy, normed)


def mlp_groups(rows: int, features: int, item_bytes: int) -> int:
    """How many groups of the MLP one chunk takes: all, since a chunk is a few launches and a GPU wants few."""
    return sys.maxsize


def _takes(x: Tensor) -> bool:
    return x.dtype in STORAGE and x.numel() > 0
