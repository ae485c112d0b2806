"""The C++ kernels against the reference, for every instruction set this machine runs, and how they come to be built."""

import os
import subprocess
import sys

import pytest
import torch

from fcmae.kernels import backends, build, cpu, reference
from fcmae.kernels.tiles import TILE_SIZES
from helpers import TOLERANCE, close, tiles
from row_kernels import (
    DTYPES,
    ROWS,
    SHAPES,
    check_exactness,
    check_gelu,
    check_huge,
    check_norm,
    check_tails,
    gelu_inputs,
)

RUNS = {"avx512": "AVX512", "avx2": "AVX2", "portable": ""}
CAPABILITY = torch.backends.cpu.get_cpu_capability()
HERE = [
    n
    for n in build.INSTRUCTION_SETS
    if n == "portable" or RUNS[n] in CAPABILITY or (n, CAPABILITY) == ("avx2", "AVX512")
]
GRIDS = [(1, 1), (1, 7), (2, 3), (7, 7), (9, 4), (16, 16)]
CHANNELS = {8: (1, 19, 40), 4: (2, 7, 80), 2: (5, 33, 160), 1: (3, 65, 320)}


@pytest.fixture(params=HERE)
def instructions(request, monkeypatch):
    """The kernels of one instruction set; the choice is made anew."""
    monkeypatch.setenv("FCMAE_CPU", request.param)
    cpu.library.cache_clear()
    kernels, what = cpu.library()
    if kernels is None:
        pytest.skip(what)
    assert what == f"C++, {request.param}" == backends()["cpu"]
    yield request.param
    cpu.library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", TILE_SIZES)
@pytest.mark.parametrize("grids", [GRIDS[:3], pytest.param(GRIDS[3:], marks=pytest.mark.slow)], ids=["small", "large"])
def test_agrees_with_the_reference(instructions, grids, tile, dtype):
    for seed, grid in enumerate(grids):
        regions = grid[0] * grid[1]
        for channels in CHANNELS[tile]:
            keep = max(1, int(regions * (0.4, 0.1, 1.0)[(seed + channels) % 3]))
            t = tiles(2, grid, keep, seed)
            g = torch.Generator().manual_seed(100 * seed + channels)
            x, grad = (torch.randn(2, keep, tile, tile, channels, generator=g).to(dtype) for _ in range(2))
            weight, bias = torch.randn(channels, 1, 7, 7, generator=g), torch.randn(channels, generator=g)
            assert cpu.supports(x, 7)
            for b in (bias, None):
                exact = reference.tile_conv(x.double(), weight.double(), None if b is None else b.double(), t)
                y = cpu.tile_conv(x, weight, b, t)
                assert y.dtype == dtype
                close(y, exact, TOLERANCE[dtype])
            exact = reference.tile_conv_weight_grad(x.double(), grad.double(), 7, t)
            for ours, theirs in zip(cpu.tile_conv_weight_grad(x, grad, 7, t), exact, strict=True):
                close(ours, theirs, TOLERANCE[torch.float32])


def test_threads_change_no_bit(instructions):
    t = tiles(3, (7, 7), 19)
    x, grad, weight = torch.randn(3, 19, 4, 4, 80), torch.randn(3, 19, 4, 4, 80), torch.randn(80, 1, 7, 7)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((cpu.tile_conv(x, weight, None, t), *cpu.tile_conv_weight_grad(x, grad, 7, t)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_not_supported_runs_the_reference():
    t = tiles(2, (3, 3), 4)
    x, weight = torch.randn(2, 4, 8, 8, 5), torch.randn(5, 1, 5, 5)
    assert not cpu.supports(x.double(), 7) and not cpu.supports(x, 5) and not cpu.supports(x[:, :, :6, :6], 7)
    assert torch.equal(cpu.tile_conv(x, weight, None, t), reference.tile_conv(x, weight, None, t))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_and_grn_agree_with_the_reference(instructions, shape, dtype):
    check_gelu(cpu, *gelu_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_where_its_tails_are_all_there_is(instructions, dtype):
    check_tails(cpu, dtype)


def test_gelu_is_exact_to_fp32(instructions):
    check_exactness(cpu)


@pytest.mark.parametrize("size", [100.0, 1e4, 1e15])
def test_gelu_of_huge_values_stays_finite(instructions, size):
    check_huge(cpu, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_layer_norm_agrees_with_the_reference(instructions, shape, dtype):
    check_norm(cpu, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_as_torch_rounds_it(instructions, dtype):
    """Every finite and infinite value of the dtype survives, and fp32 goes to the nearest even one."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    ties = torch.cat([every.float() * s for s in (1.0, 1 + 2**-9, 1 + 2**-11, 1 + 2**-12, 1 - 2**-10)]).to(dtype)
    x = ties.view(1, 1, 1, 1, -1).contiguous()
    weight = torch.zeros(x.shape[-1], 1, 7, 7)
    weight[:, 0, 3, 3] = 1 + torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(0)) / 64
    ours = cpu.tile_conv(x, weight, None, tiles(1, (1, 1), 1))
    assert torch.equal(ours.flatten(), (x.float().flatten() * weight[:, 0, 3, 3]).to(dtype))


SHOW = "import fcmae.kernels; print(fcmae.kernels.backends()['cpu'])"


def shown(tmp_path, **environment) -> subprocess.Popen:
    full = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", SHOW], env=full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ranks_that_start_together_build_one_whole_library(tmp_path):
    if cpu.library()[0] is None:
        pytest.skip(cpu.library()[1])
    started, said = [shown(tmp_path) for _ in range(3)], ""
    for process in started:
        out, err = process.communicate(timeout=120)
        assert out.strip() == f"C++, {cpu.instruction_set()}", err
        said += err
    assert said.count("compiling") == 1
    assert sorted(p.suffix for p in (tmp_path / "fcmae").iterdir()) == ["", ".so"]  # the lock and the library
    out, err = shown(tmp_path, CXX="no-such-compiler", PATH="").communicate(timeout=120)
    assert out.startswith("C++") and "compiling" not in err  # from the cache, without a compiler


def test_without_a_compiler_the_reference_runs_and_says_so(tmp_path):
    out, _ = shown(tmp_path, CXX="no-such-compiler", PATH="").communicate(timeout=120)
    assert out.strip() == "PyTorch reference (the C++ kernels were not built: no C++ compiler (g++ or clang++))"
    out, _ = shown(tmp_path, FCMAE_CPU="none").communicate(timeout=120)
    assert out.strip() == "PyTorch reference (turned off by FCMAE_CPU=none)"
    (tmp_path / "broken").write_text("#!/bin/sh\necho 'x.cpp:1: error: no such flag' >&2; exit 1\n")
    (tmp_path / "broken").chmod(0o755)
    out, _ = shown(tmp_path, CXX=str(tmp_path / "broken")).communicate(timeout=120)
    assert out.strip() == "PyTorch reference (the C++ kernels were not built: x.cpp:1: error: no such flag)"
