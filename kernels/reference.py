"""Plain PyTorch of every kernel: their meaning, their fallback everywhere, and what the others are tested against.

A submanifold depthwise convolution over tiles is the dense convolution of the map whose masked regions are zero, read
where something is visible (FCMAE, arXiv 2301.00808 §3.1). The others are the passes between the matrix products of a
ConvNeXt V2 block: LayerNorm before the first, GELU and GRN between the first and the second (same paper, §4), cut where
a sum over an image's positions must be known before the next can begin. fp16 and bf16 compute in fp32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.kernels.tiles import Tiles, pack, unpack


def _accumulate_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(_accumulate_in(x.dtype))


def _channels_first_map(x: Tensor, tiles: Tiles) -> Tensor:
    return unpack(_wide(x), tiles).permute(0, 3, 1, 2)


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


def layer_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LayerNorm of rows y (R, C): the result (R, C) in dtype, and each row's mean and 1 / std, (R, 2) in fp32."""
    wide = _wide(y)
    mean = wide.mean(1, keepdim=True)
    rstd = ((wide - mean).square().mean(1, keepdim=True) + eps).rsqrt()
    n = (wide - mean) * rstd * weight.to(wide.dtype) + bias.to(wide.dtype)
    return n.to(dtype), torch.cat([mean, rstd], 1)


def layer_norm_backward(grad: Tensor, y: Tensor, weight: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `layer_norm`: of y (R, C) in y's dtype, of weight and bias (C,) in fp32. stats as it returned them."""
    grad, (mean, rstd) = _wide(grad), stats.split(1, 1)
    unit = (_wide(y) - mean) * rstd
    g = grad * weight.to(grad.dtype)
    dy = (g - g.mean(1, keepdim=True) - unit * (g * unit).mean(1, keepdim=True)) * rstd
    return dy.to(y.dtype), (grad * unit).sum(0), grad.sum(0)


def gelu_squares(h: Tensor) -> Tensor:
    """Sums over each group's rows of gelu(h)^2: h (G, n, F) to (G, F) in fp32. A group is what GRN pools over."""
    return F.gelu(_wide(h)).square().sum(1)


def gelu_affine(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """gelu(h) * scale + shift in h's dtype: h (G, n, F), scale (G, F) and shift (F,) in fp32."""
    return (F.gelu(_wide(h)) * scale[:, None] + shift).to(h.dtype)


def gelu_affine_sums(h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over each group's rows of grad * gelu(h) and of grad: h, grad (G, n, F) to two (G, F) in fp32."""
    grad = _wide(grad)
    return (grad * F.gelu(_wide(h))).sum(1), grad.sum(1)


def gelu_affine_backward(
    h: Tensor, grad: Tensor, scale: Tensor, shift: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of h, the value of `gelu_affine` once more, and the gradient's sum over all rows, (F,) in fp32.

    h, grad: (G, n, F). scale, slope: (G, F), shift: (F,), fp32: GRN's output is a * scale + shift with a = gelu(h), and
    slope is what its statistics add to a's gradient, which is grad * scale + a * slope. grad may be overwritten.
    """
    wide = _wide(h)
    cdf = 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    density = torch.exp(-0.5 * wide.square()) / math.sqrt(2 * math.pi)
    a = wide * cdf
    dh = (_wide(grad) * scale[:, None] + a * slope[:, None]) * (cdf + wide * density)
    return dh.to(h.dtype), (a * scale[:, None] + shift).to(h.dtype), dh.sum((0, 1))
