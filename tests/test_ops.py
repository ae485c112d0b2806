"""The tile ops against Conv2d times mask, their derivatives, and what torch.library asks of an op."""

import pytest
import torch
import torch.nn.functional as F

from fcmae.kernels import ops, reference
from fcmae.kernels.tiles import pack, unpack
from helpers import TOLERANCE, close, tiles

SHAPES = [  # batch, grid, keep, t, channels
    (2, (3, 3), 4, 8, 5),
    (2, (4, 2), 3, 4, 8),
    (3, (7, 7), 19, 2, 6),
    (2, (5, 9), 11, 1, 3),
    (1, (1, 1), 1, 8, 1),
    (2, (1, 6), 1, 1, 13),
    (2, (2, 2), 4, 4, 7),
]


def case(shape, dtype=torch.float64, seed=0):
    batch, grid, keep, t, c = shape
    g = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return rand(batch, keep, t, t, c), rand(c, 1, 7, 7), rand(c), tiles(batch, grid, keep, seed)


def dense(x, weight, bias, t):
    """The same by nn.functional.conv2d on a map multiplied by the mask, pixel by pixel."""
    full = torch.zeros(x.shape[0], x.shape[-1], t.grid[0] * x.shape[2], t.grid[1] * x.shape[3], dtype=x.dtype)
    seen = torch.zeros_like(full[:, :1])
    side = x.shape[2]
    for b in range(x.shape[0]):
        for k, region in enumerate(t.keep[b].tolist()):
            top, left = region // t.grid[1] * side, region % t.grid[1] * side
            full[b, :, top : top + side, left : left + side] = x[b, k].permute(2, 0, 1)
            seen[b, :, top : top + side, left : left + side] = 1
    return F.conv2d(full, weight, bias, padding=3, groups=x.shape[-1]) * seen


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_conv2d_times_mask(shape):
    x, weight, bias, t = case(shape)
    y = ops.tile_conv(x, weight, bias, *t, False)
    close(unpack(y, t).permute(0, 3, 1, 2), dense(x, weight, bias, t), TOLERANCE[torch.float64])


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_conv2d_times_mask(shape):
    x, weight, bias, t = case(shape)
    grads = []
    for compute in (lambda *a: unpack(ops.tile_conv(*a, *t, False), t).permute(0, 3, 1, 2), lambda *a: dense(*a, t)):
        leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
        y = compute(*leaves)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        grads.append(torch.autograd.grad((y * noise).sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        close(ours, theirs, TOLERANCE[torch.float64])


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_fp32(dtype, native):
    x, weight, bias, t = case((2, (4, 4), 6, 4, 8), dtype)
    exact = reference.tile_conv(x.double(), weight.double(), bias.double(), t)
    y = ops.tile_conv(x, weight, bias, *t, native)
    assert y.dtype == dtype
    close(y, exact, TOLERANCE[dtype])
    grad_weight, grad_bias = ops.tile_conv_weight_grad(x, y, 7, *t, native)
    exact_weight, exact_bias = reference.tile_conv_weight_grad(x.double(), y.double(), 7, t)
    assert grad_weight.dtype == grad_bias.dtype == torch.float32
    close(grad_weight, exact_weight, TOLERANCE[torch.float32])
    close(grad_bias, exact_bias, TOLERANCE[torch.float32])


def test_gradcheck_twice():
    x, weight, bias, t = case((2, (3, 2), 3, 2, 2))
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: ops.tile_conv(*a, *t, False), leaves)
    assert torch.autograd.gradgradcheck(lambda *a: ops.tile_conv(*a, *t, False), leaves)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, native):
    x, weight, bias, t = case((2, (3, 3), 4, 4, 5), dtype)
    for b in (bias, None):
        args = (x.clone().requires_grad_(), weight.clone().requires_grad_(), b, *t, native)
        torch.library.opcheck(torch.ops.fcmae.tile_conv.default, args)
    args = (x.clone().requires_grad_(), x.clone().requires_grad_(), 7, *t, native)
    torch.library.opcheck(torch.ops.fcmae.tile_conv_weight_grad.default, args)


@pytest.mark.parametrize("native", [False, True])
def test_weight_gradient_repeats_bit_for_bit(native):
    x, _, _, t = case((4, (7, 7), 19, 8, 16), torch.float32)
    first = ops.tile_conv_weight_grad(x, x, 7, *t, native)
    for _ in range(3):
        for a, b in zip(first, ops.tile_conv_weight_grad(x, x, 7, *t, native), strict=True):
            assert torch.equal(a, b)


def test_pack_and_unpack_are_inverse_and_ordered():
    x, _, _, t = case((3, (3, 5), 6, 4, 2))
    full = unpack(x, t)
    assert torch.equal(pack(full, t), x)
    assert (t.keep[:, 1:] > t.keep[:, :-1]).all()
    for b in range(3):
        for k, region in enumerate(t.keep[b].tolist()):
            assert t.slot[b].flatten()[region] == k and not t.mask[b].flatten()[region]
    assert ((t.slot == -1) == t.mask).all()
    hidden = t.mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert (full[hidden] == 0).all() and (full[~hidden] != 0).all()


@pytest.mark.parametrize("native", [False, True])
def test_autocast_changes_nothing_inside_the_ops(native):
    x, weight, bias, t = case((2, (4, 4), 6, 4, 8), torch.float32)
    plain = ops.tile_conv(x, weight, bias, *t, native), *ops.tile_conv_weight_grad(x, x, 7, *t, native)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.tile_conv(x, weight, bias, *t, native), *ops.tile_conv_weight_grad(x, x, 7, *t, native)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))
