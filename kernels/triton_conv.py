"""Depthwise 7x7 convolution on packed visible tiles, and its weight gradient, in Triton (NVIDIA Ampere or later, AMD).

A *unit* is what one step computes for one block of channels: H whole rows of a T x T tile, H = T but for the upper and
lower halves of an 8x8 tile. The 3 pixels around it lie in 3x3 units (T = 8, 4), 5x5 (T = 2) or 7x7 (T = 1). One table
entry says for each of them whether it is visible; if not, one scalar branch skips its loads and its products.

A thread owns channels, never pixels: everything about a unit is a tuple of (BLOCK,) vectors in registers, all taps are
unrolled, and nothing is exchanged between threads. So a pixel around a unit is read once per unit, not once per tap.
With everything visible an output costs 49 multiply-adds and (H + 6)(T + 6) / HT loads of x: 4.4 at T = 8, 6.3 at
T = 4, 16 at T = 2, 49 at T = 1; a masked neighbour takes its share from both. The 49 taps stay in registers over all
units of a program (HOLD), except at T = 1, where no tap serves two products of a unit and more channels per thread pay.
The weight gradient is the same walk with the 49 sums in registers instead of the taps.

One warp is one program, since a whole program takes a branch. Blocks and units per program follow from the shapes alone
(`PLANS`): every rank and every run sums in the same order, nothing is timed, and a CUDA graph can be captured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.kernels import reference
from fcmae.kernels.tiles import Tiles, takes_tiles


class Plan(NamedTuple):
    """How one tile size is cut into programs. Figures in brackets: registers per thread, compiled for sm_90, bf16."""

    rows: int  # of a unit, H
    block: int  # channels per program: 32 lanes times channels per thread
    hold: bool  # the taps in registers
    units: int  # per program
    grad_block: int
    grad_programs: int  # over all blocks of channels: what 132 SMs hold at once


PLANS = {
    8: Plan(rows=4, block=32, hold=True, units=2, grad_block=32, grad_programs=2048),  # (128, 128)
    4: Plan(rows=4, block=32, hold=True, units=4, grad_block=32, grad_programs=2560),  # (80, 96)
    2: Plan(rows=2, block=64, hold=True, units=4, grad_block=64, grad_programs=1536),  # (128, 168)
    1: Plan(rows=1, block=256, hold=False, units=2, grad_block=64, grad_programs=1024),  # (124, 230)
}
MAX_PARTIALS = 512


@triton.constexpr_function
def _around(U):
    """How many units U pixels long a unit and 3 pixels on both sides of it touch."""
    return 2 * ((U + 2) // U) + 1


@triton.constexpr_function
def _dy(i, T, H):
    """How many units neighbour i, of the row-major square around a unit, lies below it."""
    return i // _around(T) - _around(H) // 2


@triton.constexpr_function
def _dx(i, T):
    return i % _around(T) - _around(T) // 2


@triton.constexpr_function
def _reached(j, DY, DX, T, H):
    """Whether any output of a unit sees pixel j of the unit (DY, DX) units away."""
    y, x = DY * H + j // T, DX * T + j % T
    return -3 <= y < H + 3 and -3 <= x < T + 3


@triton.constexpr_function
def _low(a):
    return max(a, 0)


@triton.constexpr_function
def _high(a, U):
    return min(a, U)


@triton.jit(do_not_specialize=["images", "visible", "gh", "gw"])
def _prepare_kernel(
    weight, keep, slot, taps, table, place, images, visible, gh, gw, C: tl.constexpr, TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the kernels below would otherwise work out again for each unit and each block of channels.

    table: (B, gh + 6, gw + 6) int32, the number b * visible + slot of a visible tile, -1 where masked and on the rim.
    place: (B * visible) int32, where in table a tile lies. taps: (49, C) fp32, from weight (C, 49).
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = gh + 6
    columns = gw + 6
    b = i // (rows * columns)
    y = i // columns % rows - 3
    x = i % columns - 3
    inside = (b < images) & (y >= 0) & (y < gh) & (x >= 0) & (x < gw)
    s = tl.load(slot + (b * gh + y) * gw + x, mask=inside, other=-1).to(tl.int32)
    tl.store(table + i, tl.where(s >= 0, b * visible + s, -1), mask=b < images)
    tile = i < images * visible
    region = tl.load(keep + i, mask=tile, other=0).to(tl.int32)
    tl.store(place + i, (i // visible * rows + region // gw + 3) * columns + region % gw + 3, mask=tile)
    if TAPS:
        tap = i < 49 * C
        tl.store(taps + i, tl.load(weight + i % C * 49 + i // C, mask=tap, other=0.0).to(tl.float32), mask=tap)


@triton.jit
def _neighbours(table, place, columns, half, T: tl.constexpr, H: tl.constexpr):
    """The tiles that the units around a unit belong to, row-major, -1 for not visible."""
    N: tl.constexpr = T // H
    REACH: tl.constexpr = _around(T) // 2
    here = table + tl.load(place)
    tiles = ()
    for i in tl.static_range(_around(H) * _around(T)):
        dy = (half + _dy(i, T, H) + N * REACH) // N - REACH  # of a sum that is not negative: // truncates
        tiles = tiles + (tl.load(here + (dy * columns + _dx(i, T))),)
    return tiles


@triton.jit
def _load(
    x, tile, half, c, DY: tl.constexpr, DX: tl.constexpr, C: tl.constexpr, T: tl.constexpr, H: tl.constexpr
):  # fmt: skip
    """The H*T pixels in fp32 of the unit (DY, DX) units away, which belongs to `tile`; 0 for those no output sees."""
    first = (half + DY + 2 * (T // H)) % (T // H) * (H * T)
    x += tile.to(tl.int64) * (T * T * C) + first * C
    pixels = ()
    for j in tl.static_range(H * T):
        if _reached(j, DY, DX, T, H):
            # Lanes past C stay undefined: no lane's value ever reaches another, and theirs are never stored.
            pixels = pixels + (tl.load(x + j * C + c, mask=c < C).to(tl.float32),)
        else:
            pixels = pixels + (0.0,)
    return pixels


@triton.jit
def _convolve(
    acc, pixels, held, taps, c, DY: tl.constexpr, DX: tl.constexpr, C: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
    HOLD: tl.constexpr,
):  # fmt: skip
    """acc[o] plus what output o takes from the pixels of the unit (DY, DX) units away."""
    sums = ()
    for o in tl.static_range(H * T):
        total = acc[o]
        for y in tl.static_range(_low(o // T - 3 - DY * H), _high(o // T + 4 - DY * H, H)):
            for x in tl.static_range(_low(o % T - 3 - DX * T), _high(o % T + 4 - DX * T, T)):
                if HOLD:
                    tap = held[(DY * H + y - o // T + 3) * 7 + DX * T + x - o % T + 3]
                else:
                    tap = tl.load(taps + ((DY * H + y - o // T + 3) * 7 + DX * T + x - o % T + 3) * C + c, mask=c < C)
                total = tl.fma(pixels[y * T + x], tap, total)
        sums = sums + (total,)
    return sums


@triton.jit
def _correlate(acc, pixels, grads, DY: tl.constexpr, DX: tl.constexpr, T: tl.constexpr, H: tl.constexpr):
    """acc[k] plus the products of tap k: pixels (DY, DX) units away times the gradients of outputs that see them."""
    sums = ()
    for k in tl.static_range(49):
        total = acc[k]
        for y in tl.static_range(_low(k // 7 - 3 - DY * H), _high(k // 7 - 3 - DY * H + H, H)):
            for x in tl.static_range(_low(k % 7 - 3 - DX * T), _high(k % 7 - 3 - DX * T + T, T)):
                total = tl.fma(pixels[y * T + x], grads[(y + DY * H + 3 - k // 7) * T + x + DX * T + 3 - k % 7], total)
        sums = sums + (total,)
    return sums


@triton.jit(do_not_specialize=["units", "per_program", "columns"])
def _conv_kernel(
    x, taps, bias, y, table, place, units, per_program, columns, C: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, HOLD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """x, y: (tiles, T, T, C). taps: (49, C). Program: (run of units, block of channels), blocks fastest."""
    N: tl.constexpr = T // H
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    c = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) // BLOCKS * per_program
    held = ()
    if HOLD:
        for k in tl.static_range(49):
            held = held + (tl.load(taps + k * C + c, mask=c < C),)
    start = tl.zeros([BLOCK], tl.float32)
    if BIAS:
        start = tl.load(bias + c, mask=c < C).to(tl.float32)
    y += first.to(tl.int64) * (H * T * C)
    for n in range(first, min(first + per_program, units)):
        near = _neighbours(table, place + n // N, columns, n % N, T, H)
        acc = (start,) * (H * T)
        for i in tl.static_range(_around(H) * _around(T)):
            if near[i] >= 0:
                pixels = _load(x, near[i], n % N, c, _dy(i, T, H), _dx(i, T), C, T, H)
                acc = _convolve(acc, pixels, held, taps, c, _dy(i, T, H), _dx(i, T), C, T, H, HOLD)
        for o in tl.static_range(H * T):
            tl.store(y + o * C + c, acc[o].to(y.dtype.element_ty), mask=c < C)
        y += H * T * C


@triton.jit(do_not_specialize=["units", "per_program", "columns"])
def _weight_grad_kernel(
    x, grad, partial, table, place, units, per_program, columns, C: tl.constexpr, T: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x, grad: (tiles, T, T, C). partial: (P, 50, C), sums over a run of units for the 49 taps and the bias."""
    N: tl.constexpr = T // H
    BLOCKS: tl.constexpr = (C + BLOCK - 1) // BLOCK
    c = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    program = tl.program_id(0) // BLOCKS
    acc = (tl.zeros([BLOCK], tl.float32),) * 49
    bias = tl.zeros([BLOCK], tl.float32)
    first = program * per_program
    grad += first.to(tl.int64) * (H * T * C)
    for n in range(first, min(first + per_program, units)):
        near = _neighbours(table, place + n // N, columns, n % N, T, H)
        grads = ()
        for o in tl.static_range(H * T):
            grads = grads + (tl.load(grad + o * C + c, mask=c < C).to(tl.float32),)
            bias += grads[o]
        for i in tl.static_range(_around(H) * _around(T)):
            if near[i] >= 0:
                pixels = _load(x, near[i], n % N, c, _dy(i, T, H), _dx(i, T), C, T, H)
                acc = _correlate(acc, pixels, grads, _dy(i, T, H), _dx(i, T), T, H)
        grad += H * T * C
    out = partial + program.to(tl.int64) * (50 * C) + c
    for k in tl.static_range(49):
        tl.store(out + k * C, acc[k], mask=c < C)
    tl.store(out + 49 * C, bias, mask=c < C)


def _plan(x: Tensor) -> Plan:
    plan = PLANS[x.shape[2]]
    if torch.version.hip:  # 64 lanes; 4 rows of 8 spill registers there
        rows = 2 if x.shape[2] == 8 else plan.rows
        plan = plan._replace(rows=rows, block=max(plan.block, 64), grad_block=max(plan.grad_block, 64))
    return plan


def _prepare(tiles: Tiles, channels: int, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The table, the places and the taps of `_prepare_kernel`."""
    (b, gh, gw), visible = tiles.slot.shape, tiles.keep.shape[1]
    new = tiles.slot.new_empty
    table = new(b, gh + 6, gw + 6, dtype=torch.int32)
    place = new(b * visible, dtype=torch.int32)
    taps = None if weight is None else new(49, channels, dtype=torch.float32)
    work = max(table.numel(), place.numel(), 0 if taps is None else taps.numel())
    _prepare_kernel[(triton.cdiv(work, 256),)](
        weight, tiles.keep.contiguous(), tiles.slot.contiguous(), taps, table, place, b, visible, gh, gw,
        C=channels, TAPS=taps is not None, BLOCK=256,
    )  # fmt: skip
    return table, place, taps


def tile_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """`reference.tile_conv` in Triton where it `takes_tiles` like these."""
    if not takes_tiles(x, weight.shape[-1]):
        return reference.tile_conv(x, weight, bias, tiles)
    x, plan = x.contiguous(), _plan(x)
    (b, visible, t, _, c), y = x.shape, torch.empty_like(x)
    units = b * visible * (t // plan.rows)
    with torch.cuda.device_of(x):
        table, place, taps = _prepare(tiles, c, weight.contiguous())
        _conv_kernel[(triton.cdiv(c, plan.block) * triton.cdiv(units, plan.units),)](
            x, taps, None if bias is None else bias.contiguous(), y, table, place, units, plan.units, table.shape[2],
            C=c, T=t, H=plan.rows, BLOCK=plan.block, HOLD=plan.hold, BIAS=bias is not None, num_warps=1, num_stages=1,
        )  # fmt: skip
    return y


def tile_conv_weight_grad(x: Tensor, grad: Tensor, k: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """`reference.tile_conv_weight_grad` in Triton where it `takes_tiles` like these."""
    if not takes_tiles(x, k):
        return reference.tile_conv_weight_grad(x, grad, k, tiles)
    x, grad, plan = x.contiguous(), grad.contiguous(), _plan(x)
    b, visible, t, _, c = x.shape
    units, blocks = b * visible * (t // plan.rows), triton.cdiv(c, plan.grad_block)
    per_program = triton.cdiv(units, max(1, min(plan.grad_programs // blocks, MAX_PARTIALS)))
    with torch.cuda.device_of(x):
        table, place, _ = _prepare(tiles, c, None)
        partial = x.new_empty(triton.cdiv(units, per_program), 50, c, dtype=torch.float32)
        _weight_grad_kernel[(blocks * partial.shape[0],)](
            x, grad, partial, table, place, units, per_program, table.shape[2],
            C=c, T=t, H=plan.rows, BLOCK=plan.grad_block, num_warps=1, num_stages=1,
        )  # fmt: skip
    return partial[:, :49].sum(0).t().contiguous().view(c, 1, 7, 7), partial[:, 49].sum(0)
