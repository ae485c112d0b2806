"""`fcmae::block_mlp`, the op after a block's convolution, against the block composed of PyTorch's own modules."""

import pytest
import torch

from fcmae.kernels import cpu, mlp, mlp_op
from fcmae.kernels.mlp import Weights
from fcmae.models.layers import Block
from fcmae.models.norms import GRN_MODES
from fcmae.models.support import TileSupport
from helpers import TOLERANCE, close, shake, tiles


def case(groups, rows, c, dtype=torch.float64, seed=0):
    """shortcut, y and the weights, all leaves."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(groups * rows, c)] * 2 + [(c,), (c,), (4 * c, c), (4 * c,), (4 * c,), (4 * c,), (c, 4 * c), (c,)]
    made = [torch.randn(s, generator=g, dtype=torch.float64) / (s[1] ** 0.5 if len(s) > 1 else 1) for s in shapes]
    return [t.to(dtype).requires_grad_() for t in made]


def op(groups, native=True):
    return lambda *leaves: mlp_op.block_mlp(*leaves, groups, native)[0]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups, rows, c", [(3, 7, 5), (2, 100, 40), (4, 1, 33), (1, 130, 8)])
def test_agrees_with_the_composed_block(groups, rows, c, dtype, native):
    leaves = case(groups, rows, c, dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    noise = torch.randn(groups * rows, c, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = mlp_op.composed(*wide[:2], Weights(*wide[2:]), groups)
    ours = op(groups, native)(*leaves)
    close(ours, theirs, TOLERANCE[dtype])
    exact = torch.autograd.grad(theirs, wide, noise)
    for a, b in zip(torch.autograd.grad(ours, leaves, noise.to(dtype)), exact, strict=True):
        assert a.dtype == dtype
        close(a, b, TOLERANCE[dtype])


def test_gradcheck_twice():
    leaves = case(2, 3, 2)
    assert torch.autograd.gradcheck(op(2), leaves)
    assert torch.autograd.gradgradcheck(op(2), leaves)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, native):
    leaves = case(2, 3, 5, dtype)
    torch.library.opcheck(torch.ops.fcmae.block_mlp.default, (*leaves, 2, native))
    shortcut, y, *weights = [t.detach() for t in leaves]
    out, *kept = mlp_op.block_mlp(shortcut, y, *weights, 2, native)
    torch.library.opcheck(torch.ops.fcmae.block_mlp_backward.default, (out, y, *weights, *kept, native))


def test_chunks_change_nothing_but_the_order_of_sums(monkeypatch):
    leaves = case(7, 20, 8, torch.float32)
    noise = torch.randn(140, 8, generator=torch.Generator().manual_seed(2))

    def run():
        out = op(7)(*leaves)
        return out, *torch.autograd.grad(out, leaves, noise)

    whole = run()
    monkeypatch.setattr(cpu, "MLP_BYTES", 1)
    chunks = mlp._chunks(cpu, 7, 20, torch.empty(140, 32))
    assert [c.start for c in chunks] == list(range(0, 140, 20))
    for a, b in zip(run(), whole, strict=True):
        close(a, b, TOLERANCE[torch.float32])


@pytest.mark.parametrize("mode", GRN_MODES)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_native_block_is_the_plain_block(mode, autocast):
    block, where = shake(Block(24, mode)), tiles(3, (4, 5), 8)
    x = torch.randn(3, 8, 2, 2, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = []
    for native in (True, False):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            y = block(x, TileSupport(where, native))
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])))
        assert y.dtype == torch.float32
    # Under autocast both round at a dozen places, not the same ones.
    tolerance = 3 * TOLERANCE[autocast] if autocast else TOLERANCE[torch.float32]
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, tolerance)


def test_one_4c_tensor_is_kept():
    """Of what the backward will read, h alone has 4C columns."""
    kept = []
    leaves = case(2, 30, 16, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        op(2)(*leaves)
    assert kept.count((60, 64)) == 1 and (60, 16) in kept


def test_low_precision_sums_do_not_stall_over_many_chunks(monkeypatch):
    """Weight gradients of 300 chunks of alike rows: a running sum in bf16 would stop growing at some 256 of them."""
    leaves = [t.detach().abs() for t in case(300, 1, 8, torch.float32)]
    weights = Weights(*leaves[2:])
    low = weights._replace(**{k: getattr(weights, k).bfloat16() for k in ("w1", "b1", "w2", "b2")})
    monkeypatch.setattr(cpu, "MLP_BYTES", 1)
    results = []
    for w in (low, weights):
        _, *kept = mlp.forward(cpu, leaves[0], leaves[1], w, 300)
        results.append(mlp.backward(cpu, torch.ones_like(leaves[0]), leaves[1], w, *kept))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, 3 * TOLERANCE[torch.bfloat16])
