"""Plain PyTorch of every op in `ops.py`: their meaning, their fallback everywhere, and what kernels are tested against.

A submanifold depthwise convolution over tiles is the dense convolution of the map whose masked regions are zero, read
where something is visible (FCMAE, arXiv 2301.00808 §3.1). fp16 and bf16 accumulate in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.kernels.tiles import Tiles, pack, unpack


def _accumulate_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _channels_first_map(x: Tensor, tiles: Tiles) -> Tensor:
    return unpack(x.to(_accumulate_in(x.dtype)), tiles).permute(0, 3, 1, 2)


def tile_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """Depthwise convolution, stride 1, zero padding, of packed tiles.

    x: (B, K, t, t, C) fp16, bf16, fp32 or fp64. weight: (C, 1, k, k), k odd. bias: (C,) or None.
    Returns (B, K, t, t, C) in x's dtype.
    """
    wide = _accumulate_in(x.dtype)
    bias = None if bias is None else bias.to(wide)
    k = weight.shape[-1]
    y = F.conv2d(_channels_first_map(x, tiles), weight.to(wide), bias, padding=k // 2, groups=x.shape[-1])
    return pack(y.permute(0, 2, 3, 1).contiguous(), tiles).to(x.dtype)


def tile_conv_weight_grad(x: Tensor, grad: Tensor, k: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Gradients of `tile_conv`'s weight, (C, 1, k, k), and bias, (C,), in fp32 (fp64 for fp64).

    x, grad: (B, K, t, t, C), the op's input and the gradient of its output.
    """
    c = x.shape[-1]
    xm, gm = _channels_first_map(x, tiles), _channels_first_map(grad, tiles)
    weight_grad = torch.nn.grad.conv2d_weight(xm, (c, 1, k, k), gm, padding=k // 2, groups=c)
    return weight_grad, gm.sum((0, 2, 3))
