"""The backward of LayerNorm in Triton, which also computes its output once more: `layer_norm_backward` of `reference`.

One pass: gradient and input are read once, the input's gradient and the output written once. The sums over rows are cut
into parts that depend on shapes alone and added in order, so that results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.kernels.triton_rows import launch

PROGRAMS = 1024  # at most: their partial sums stay small beside the data
WIDEST = 8192  # columns, since a row must fit one tile


@triton.jit
def _vector(x, c, cols):
    return tl.load(x + cols, mask=cols < c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _layer_norm_backward(
    grad,
    y,
    mean,
    rstd,
    weight,
    bias,
    dy,
    normed,
    dweight,
    dbias,
    rows_total,
    c,
    span,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * span
    count = tl.minimum(span, rows_total - first).to(tl.int32)
    cols = tl.arange(0, BLOCK)
    grad, y, dy, normed = grad + first * c, y + first * c, dy + first * c, normed + first * c
    mean, rstd = mean + first, rstd + first
    w, plus = _vector(weight, c, cols), _vector(bias, c, cols)
    weight_total = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for r in range(0, count, ROWS):
        rows = r + tl.arange(0, ROWS)
        present = rows < count
        inside = present[:, None] & (cols < c)[None, :]
        at = rows[:, None] * c + cols[None, :]
        x = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + rows, mask=present, other=0.0)[:, None]
        s = tl.load(rstd + rows, mask=present, other=0.0)[:, None]
        unit = (x - m) * s
        tl.store(normed + at, unit * w + plus, mask=inside)
        weight_total += g * unit
        bias_total += g
        g *= w  # zero outside, as the weight is
        d = (g - (tl.sum(g, 1) / c)[:, None] - unit * (tl.sum(g * unit, 1) / c)[:, None]) * s
        tl.store(dy + at, d, mask=inside)
    to = tl.program_id(0).to(tl.int64) * c + cols
    tl.store(dweight + to, tl.sum(weight_total, 0), mask=cols < c)
    tl.store(dbias + to, tl.sum(bias_total, 0), mask=cols < c)


def layer_norm_backward(
    grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, normed: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.layer_norm_backward`, for C up to WIDEST."""
    n, c = y.shape
    block = triton.next_power_of_2(c)
    rows = max(1, 2048 // block)
    # Sixteen rows at least: below, the partials would be a good part of what is written.
    span = triton.cdiv(max(16, triton.cdiv(n, PROGRAMS)), rows) * rows
    programs = triton.cdiv(n, span)
    dweight, dbias = (torch.empty(programs, c, dtype=torch.float32, device=y.device) for _ in range(2))
    args = (grad, y, mean, rstd, weight, bias, dy, normed, dweight, dbias, n, c, span)
    launch(_layer_norm_backward, programs, *args, ROWS=rows, BLOCK=block, num_warps=4 if block <= 2048 else 8)
    return dweight.sum(0), dbias.sum(0)
