"""GELU and GRN between a block's matrix products in Triton, forward and backward: `gelu_grn` of `reference`.

Memory bounds every pass: a tile of rows x columns is read once in wide loads, computed on in fp32 and written once.
Sums over rows are cut into a number of parts that depends on shapes alone, written as fp32 partials and added in order:
no atomics and no tuning, so that results repeat bit for bit. Nothing waits for the device, and any pass may be recorded
in a CUDA graph. Storage is fp32, bf16 or fp16, contiguous, with at least one row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.kernels import reference

PROGRAMS = 2048  # enough for some waves on the largest GPUs, few enough that partials are small beside the data


@triton.jit
def _upper_tail(x):
    """P(X > x) of a standard normal X, for x >= 0.

    2 to the power of a polynomial, fitted to what makes gelu exact to fp32: off by less than 1.1e-7 max(1, |h|), and in
    the negative tail closer, relatively, than 1 + erf in fp32. The libraries' erff has about twice the instructions,
    more than the memory leaves time for. The polynomial only grows, so no argument is too large.
    """
    p = 2.52716914e-09 * x - 1.23785625e-07
    p = p * x + 2.42669489e-06
    p = p * x - 2.32862403e-05
    p = p * x + 8.81120141e-05
    p = p * x + 0.000406455976
    p = p * x - 0.00744472817
    p = p * x + 0.0527714752
    p = p * x + 0.459117979
    p = p * x + 1.1511147
    p = p * x + 1.0
    return tl.exp2(-p)


@triton.jit
def _gelu(x):
    return tl.maximum(x, 0.0) - tl.abs(x) * _upper_tail(tl.abs(x))


@triton.jit
def _place(n, f, chunks, span, BLOCK: tl.constexpr):
    """This program's part (group * chunks + chunk), its group, columns, number of rows and first element."""
    columns = tl.cdiv(f, BLOCK)
    part = tl.program_id(0) // columns
    group = part // chunks
    first = (part % chunks) * span
    cols = (tl.program_id(0) % columns) * BLOCK + tl.arange(0, BLOCK)
    # 64 bits, because a batch may hold more than 2^31 elements; a program's own rows never do.
    start = (group.to(tl.int64) * n + first) * f
    return part, group, cols, tl.minimum(span, n - first), start


@triton.jit
def _row(x, group, f, cols):
    return tl.load(x + group * f + cols, mask=cols < f, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _gelu_squares(h, bias, out, n, f, chunks, span, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    part, group, cols, count, start = _place(n, f, chunks, span, BLOCK)
    h += start
    rows, plus = tl.arange(0, ROWS)[:, None], _row(bias, 0, f, cols)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for r in range(0, count, ROWS):
        inside = (r + rows < count) & (cols < f)[None, :]
        x = tl.load(h + (r + rows) * f + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        a = tl.where(inside, _gelu(x + plus), 0.0)
        total += a * a
    tl.store(out + part.to(tl.int64) * f + cols, tl.sum(total, 0), mask=cols < f)


@triton.jit
def _gelu_affine(h, bias, scale, shift, out, n, f, chunks, span, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    part, group, cols, count, start = _place(n, f, chunks, span, BLOCK)
    h, out = h + start, out + start
    rows = tl.arange(0, ROWS)[:, None]
    mul, add, plus = _row(scale, group, f, cols), _row(shift, 0, f, cols), _row(bias, 0, f, cols)
    for r in range(0, count, ROWS):
        inside = (r + rows < count) & (cols < f)[None, :]
        at = (r + rows) * f + cols[None, :]
        a = _gelu(tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + plus)
        tl.store(out + at, a * mul + add, mask=inside)


@triton.jit
def _gelu_affine_sums(h, bias, grad, products, grads, n, f, chunks, span, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    part, group, cols, count, start = _place(n, f, chunks, span, BLOCK)
    h, grad = h + start, grad + start
    rows, plus = tl.arange(0, ROWS)[:, None], _row(bias, 0, f, cols)
    product = tl.zeros([ROWS, BLOCK], tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for r in range(0, count, ROWS):
        inside = (r + rows < count) & (cols < f)[None, :]
        at = (r + rows) * f + cols[None, :]
        x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        product += g * _gelu(x + plus)  # zero outside, where g is
        total += g
    to = part.to(tl.int64) * f + cols
    tl.store(products + to, tl.sum(product, 0), mask=cols < f)
    tl.store(grads + to, tl.sum(total, 0), mask=cols < f)


@triton.jit
def _gelu_affine_backward(
    h, bias, grad, scale, shift, slope, out, sums, n, f, chunks, span, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    part, group, cols, count, start = _place(n, f, chunks, span, BLOCK)
    h, grad, out = h + start, grad + start, out + start
    rows, plus = tl.arange(0, ROWS)[:, None], _row(bias, 0, f, cols)
    mul, add, slopes = _row(scale, group, f, cols), _row(shift, 0, f, cols), _row(slope, group, f, cols)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for r in range(0, count, ROWS):
        inside = (r + rows < count) & (cols < f)[None, :]
        at = (r + rows) * f + cols[None, :]
        x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + plus
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        tail = _upper_tail(tl.abs(x))
        a = tl.maximum(x, 0.0) - tl.abs(x) * tail
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)  # exp(-x^2 / 2) / sqrt(2 pi)
        d = (g * mul + a * slopes) * (tl.where(x > 0, 1.0 - tail, tail) + x * density)
        tl.store(grad + at, d, mask=inside)
        tl.store(out + at, a * mul + add, mask=inside)
        total += tl.where(inside, d, 0.0)
    tl.store(sums + part.to(tl.int64) * f + cols, tl.sum(total, 0), mask=cols < f)


def launch(kernel, programs: int, *args, **options) -> None:
    """Run a kernel on `programs` programs."""
    # The tensors' own device, which need not be the current one. Fused multiply-adds are half of a polynomial's cost.
    with torch.cuda.device_of(args[0]):
        kernel[(programs,)](*args, **options, enable_fp_fusion=True)


class _Cut(NamedTuple):
    """How (G, n, F) is shared out: each group into chunks of span rows, columns into blocks, a program for each pair.

    A program walks over its chunk, rows at a time: fewer where a kernel holds more in registers.
    """

    programs: int
    partials: tuple[int, int, int]
    sizes: tuple[int, int, int, int]
    tile: dict[str, int]

    @classmethod
    def of(cls, h: Tensor, rows: int = 16) -> _Cut:
        g, n, f = h.shape
        rows, block = 8 if n <= 32 else rows, min(256, triton.next_power_of_2(f))
        columns = triton.cdiv(f, block)
        chunks = min(triton.cdiv(PROGRAMS, g * columns), triton.cdiv(n, 4 * rows))
        span = triton.cdiv(triton.cdiv(n, chunks), rows) * rows
        chunks = triton.cdiv(n, span)
        return cls(g * chunks * columns, (g, chunks, f), (n, f, chunks, span), {"ROWS": rows, "BLOCK": block})


def _fp32(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _added(partials: Tensor) -> Tensor:
    return partials.sum(1) if partials.shape[1] > 1 else partials.squeeze(1)


def gelu_grn(h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, z: Tensor) -> Tensor:
    """`reference.gelu_grn`; GELU is computed in both passes, which costs a GPU less than writing it down."""
    cut = _Cut.of(h)
    sums = _fp32(cut.partials, h)
    launch(_gelu_squares, cut.programs, h, bias, sums, *cut.sizes, **cut.tile)
    squares = _added(sums)
    scale = 1 + gamma * reference.response(squares)[1]
    launch(_gelu_affine, cut.programs, h, bias, scale, beta, z, *cut.sizes, **cut.tile)
    return squares


def gelu_grn_backward(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, squares: Tensor, grad: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.gelu_grn_backward`."""
    cut = _Cut.of(h, rows=8)
    products, totals = _fp32(cut.partials, h), _fp32(cut.partials, h)
    launch(_gelu_affine_sums, cut.programs, h, bias, grad, products, totals, *cut.sizes, **cut.tile)
    d_beta = totals.sum((0, 1))
    scale, slope, d_gamma = reference.grn_backward(gamma, squares, _added(products))
    sums, factors = totals, (scale, beta, slope)
    launch(_gelu_affine_backward, cut.programs, h, bias, grad, *factors, z, sums, *cut.sizes, **cut.tile)
    return sums.sum((0, 1)), d_gamma, d_beta
