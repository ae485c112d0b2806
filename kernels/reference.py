"""Plain PyTorch of every kernel: their meaning, their fallback everywhere, and what the others are tested against.

A submanifold depthwise convolution over tiles is the dense convolution of the map whose masked regions are zero, read
where something is visible (FCMAE, arXiv 2301.00808 §3.1). The others are the passes between the two matrix products of
a ConvNeXt V2 block, GELU and GRN (same paper, §4), cut where a sum over an image's positions must be known before the
next pass can begin. fp16 and bf16 compute in fp32.
"""

from __future__ import annotations

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.kernels.tiles import Tiles, pack, unpack

GRN_EPS, TINY = 1e-6, 1e-24  # TINY keeps the gradient finite where a feature is zero everywhere


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


def response(squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GRN's statistics of sums of squares (G, F): norm (G, F), response N = norm / mean (G, F), mean (G, 1)."""
    norm = (squares + TINY).sqrt()  # of sums, six times faster on a CPU than vector_norm
    mean = norm.mean(-1, keepdim=True) + GRN_EPS
    return norm, norm / mean, mean


def gelu_grn(h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, z: Tensor) -> Tensor:
    """Fills z with GRN(gelu(h + bias)), which is a + gamma * N * a + beta; returns each group's sums of a^2, (G, F).

    h, z: (G, n, F); GRN pools over the n rows of a group. bias, gamma, beta: (F,) in fp32. The bias is added here
    because a matmul on a CPU would make a pass of its own for it.
    """
    a = F.gelu(_wide(h) + bias)
    squares = a.square().sum(1)
    z.copy_(a * (1 + gamma * response(squares)[1])[:, None] + beta)
    return squares


def gelu_grn_backward(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, squares: Tensor, grad: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Turns grad, of z, into the gradient of h; fills z once more; returns the gradients of bias, gamma, beta in fp32.

    Arguments as in `gelu_grn`, squares as it returned them; grad: (G, n, F).
    """
    wide, wide_grad = _wide(h) + bias, _wide(grad)
    cdf = 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    density = torch.exp(-0.5 * wide.square()) / math.sqrt(2 * math.pi)
    a = wide * cdf
    scale, slope, d_gamma = grn_backward(gamma, squares, (wide_grad * a).sum(1))
    dh = (wide_grad * scale[:, None] + a * slope[:, None]) * (cdf + wide * density)
    z.copy_(a * scale[:, None] + beta)
    d_beta = wide_grad.sum((0, 1))
    grad.copy_(dh)
    return dh.sum((0, 1)), d_gamma, d_beta


def grn_backward(gamma: Tensor, squares: Tensor, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GRN's factors (G, F) for the backward of a: da = grad * scale + a * slope; and gamma's gradient (F,).

    products: (G, F), each group's sums of grad * a.
    """
    norm, n, mean = response(squares)
    d_n = gamma * products
    d_norm = (d_n - (d_n * n).mean(-1, keepdim=True)) / mean
    return 1 + gamma * n, d_norm / norm, (products * n).sum(0)


def layer_norm_backward(
    grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, normed: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills dy with the gradient of LayerNorm's input, normed with its output; returns weight's and bias's gradients.

    grad, y, dy, normed: (R, C). mean, rstd: (R, 1) in fp32. weight, bias and what is returned: (C,) in fp32.
    """
    grad, unit = _wide(grad), (_wide(y) - mean) * rstd
    g = grad * weight
    dy.copy_((g - g.mean(1, keepdim=True) - unit * (g * unit).mean(1, keepdim=True)) * rstd)
    normed.copy_(unit * weight + bias)
    return (grad * unit).sum(0), grad.sum(0)


def mlp_groups(rows: int, features: int, item_bytes: int) -> int:
    """How many groups of `rows` rows of the MLP one chunk takes: all."""
    return sys.maxsize
