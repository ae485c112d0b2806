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


KEEPS_SLOPES = False  # whether `gelu_affine_sums` leaves something in its work memory `slopes`


def gelu_squares(h: Tensor, bias: Tensor, a: Tensor) -> Tensor:
    """Sums over each group's rows of gelu(h + bias)^2, (G, F) in fp32. A group is what GRN pools over.

    h: (G, n, F), the first matmul's product as it is; bias: (F,) in fp32, here and below. "gelu" below is gelu(h + bias).

    a: work memory like h, where a kernel may leave what `gelu_affine` would else compute again.
    """
    return F.gelu(_wide(h) + bias).square().sum(1)


def gelu_affine(h: Tensor, bias: Tensor, a: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Fills a with gelu * scale + shift: scale (G, F) and shift (F,) in fp32; a as `gelu_squares` left it."""
    a.copy_(F.gelu(_wide(h) + bias) * scale[:, None] + shift)


def gelu_affine_sums(
    h: Tensor, bias: Tensor, grad: Tensor, a: Tensor, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums over each group's rows of grad * gelu and of grad: h, grad (G, n, F) to two (G, F) in fp32.

    a, slopes: work memory like h, where a kernel may leave what `gelu_affine_backward` would else compute again.
    """
    grad = _wide(grad)
    return (grad * F.gelu(_wide(h) + bias)).sum(1), grad.sum(1)


def gelu_affine_backward(
    h: Tensor,
    bias: Tensor,
    grad: Tensor,
    a: Tensor,
    slopes: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
) -> Tensor:
    """Turns grad into the gradient of h, fills a as `gelu_affine` does; returns the gradient's sum over all rows, (F,).

    a, slopes as `gelu_affine_sums` left them. scale, slope: (G, F), shift: (F,), in fp32. GRN's output is
    gelu * scale + shift, and slope is what its statistics add to the gradient of gelu: grad * scale + gelu * slope.
    """
    wide = _wide(h) + bias
    cdf = 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    density = torch.exp(-0.5 * wide.square()) / math.sqrt(2 * math.pi)
    value = wide * cdf
    dh = (_wide(grad) * scale[:, None] + value * slope[:, None]) * (cdf + wide * density)
    grad.copy_(dh)
    a.copy_(value * scale[:, None] + shift)
    return dh.sum((0, 1))


def layer_norm_backward(
    grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, normed: Tensor
) -> tuple[Tensor, Tensor]:
    """Fills dy with the gradient of LayerNorm's input and normed with its output; returns weight's and bias's gradients.

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
