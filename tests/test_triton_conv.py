"""The Triton convolution against the reference: on a GPU, and everywhere under Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from fcmae.kernels import reference
from fcmae.kernels.tiles import takes_tiles
from helpers import TOLERANCE, close, tiles

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
on_device = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1")
every_size = pytest.mark.parametrize("t", [8, 4, 2, 1])
slow = pytest.mark.slow


@pytest.mark.parametrize("marked", ["not slow", "slow"])
@slow
def test_under_the_interpreter(marked):
    """The tests below, in a process of their own: Triton reads the variable when it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked]
        + ["-k", "not interpreter and not compiles and not graph", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 16 and "skipped" not in run.stdout, run.stdout[-1000:]


def sample(b, t, c, grid, keep, dtype, parameters=torch.float32, bias=True):
    """x and a gradient (B, K, t, t, C), a weight, a bias and the tiles."""
    generator = torch.Generator().manual_seed(b * t * keep)

    def random(*shape, dtype):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    x, grad = random(b, keep, t, t, c, dtype=dtype), random(b, keep, t, t, c, dtype=dtype)
    weight = random(c, 1, 7, 7, dtype=parameters)
    return x, grad, weight, random(c, dtype=parameters) if bias else None, tiles(b, grid, keep).to(DEVICE)


def check(x, grad, weight, bias, where):
    from fcmae.kernels import triton_conv

    assert takes_tiles(x, 7)
    y = triton_conv.tile_conv(x, weight, bias, where)
    assert y.dtype == x.dtype
    exact = reference.tile_conv(x.double(), weight.double(), None if bias is None else bias.double(), where)
    close(y, exact, TOLERANCE[x.dtype])
    exact = reference.tile_conv_weight_grad(x.double(), grad.double(), 7, where)
    for ours, theirs in zip(triton_conv.tile_conv_weight_grad(x, grad, 7, where), exact, strict=True):
        assert ours.dtype == torch.float32
        close(ours, theirs, TOLERANCE[torch.float32])


@on_device
@pytest.mark.parametrize(
    "grid, keep",
    [((1, 1), 1), ((1, 7), 2), ((2, 3), 2)]
    + [pytest.param(*case, marks=slow) for case in [((7, 7), 5), ((9, 4), 4), ((16, 16), 4)]],
    ids=str,
)
@every_size
def test_grids(t, grid, keep):
    check(*sample(1 if t == 8 else 2, t, 5, grid, keep if t == 8 else 2 * keep - 1, torch.float32))


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t, channels", [(8, 33), (4, 35), (2, 67), (1, 261)])
@slow
def test_dtypes_and_more_channels_than_a_block(t, channels, dtype):
    check(*sample(1, t, channels, (2, 2), 2, dtype))


@on_device
@every_size
def test_low_precision_parameters_without_bias_on_everything_visible(t):
    check(*sample(1, t, 5, (1, 2), 2, torch.bfloat16, parameters=torch.bfloat16, bias=False))


@on_device
@every_size
@slow
def test_nothing_is_read_for_a_masked_neighbour(t):
    """Its table entry, -1, would lead into the image before: a product with 0 there would not be a number either."""
    from fcmae.kernels import triton_conv

    x, grad, weight, bias, where = sample(3, t, 5, (3, 3), 1, torch.float32)
    alone = triton_conv.tile_conv(x, weight, bias, where)
    x[0], x[2] = float("nan"), float("inf")
    assert torch.equal(triton_conv.tile_conv(x, weight, bias, where)[1], alone[1])


@on_device
@every_size
@slow
def test_weight_gradient_over_several_programs_is_bitwise_repeatable(t):
    from fcmae.kernels import triton_conv

    x, grad, _, _, where = sample(3, t, 5, (1, 2), 1, torch.float32)
    first = triton_conv.tile_conv_weight_grad(x, grad, 7, where)
    second = triton_conv.tile_conv_weight_grad(x, grad, 7, where)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@every_size
def test_cuda_graph(t):
    from fcmae.kernels import triton_conv

    x, grad, weight, bias, where = sample(2, t, 5, (3, 3), 4, torch.float32)

    def both():
        return triton_conv.tile_conv(x, weight, bias, where), *triton_conv.tile_conv_weight_grad(x, grad, 7, where)

    expected, graph = both(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize(
    "t, target",
    [*((t, ("cuda", 90, 32)) for t in (8, 4, 2, 1)), *((t, ("hip", "gfx942", 64)) for t in (2, 1))],
    ids=str,
)
@slow
def test_compiles_without_a_gpu(t, target):
    """The interpreter takes much that the compiler refuses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fcmae.kernels import triton_conv

    plan = triton_conv.PLANS[t]
    pointers = dict.fromkeys(["x", "y", "grad"], "*bf16") | dict.fromkeys(["table", "place"], "*i32")
    pointers |= dict.fromkeys(["taps", "bias", "partial"], "*fp32") | dict.fromkeys(["keep", "slot"], "*i64")
    constants = {"C": 40, "T": t, "H": plan.rows, "HOLD": plan.hold, "BIAS": True, "TAPS": True}
    for kernel, block in [
        (triton_conv._prepare_kernel, 256),
        (triton_conv._conv_kernel, plan.block),
        (triton_conv._weight_grad_kernel, plan.grad_block),
    ]:
        constexprs = {n: v for n, v in (constants | {"BLOCK": block}).items() if n in kernel.arg_names}
        signature = {n: "constexpr" if n in constexprs else pointers.get(n, "i32") for n in kernel.arg_names}
        signature |= {"weight": "*fp32"} if "weight" in signature else {}
        triton.compile(ASTSource(kernel, signature, constexprs), GPUTarget(*target), {"num_warps": 1})
