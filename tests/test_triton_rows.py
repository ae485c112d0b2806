"""The Triton kernels of GELU, GRN and LayerNorm: the checks of row_kernels.py on a GPU where there is one and through
Triton's interpreter on the CPU everywhere; and compiled for GPUs that need not be there."""

import os
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")
from fcmae.kernels import gpu, mlp, reference, triton_norm, triton_rows  # noqa: E402
from fcmae.kernels.mlp import Weights  # noqa: E402
from helpers import TOLERANCE, close  # noqa: E402
from row_kernels import (  # noqa: E402
    DTYPES,
    ROWS,
    SHAPES,
    check_exactness,
    check_gelu,
    check_huge,
    check_norm,
    check_repeats,
    check_tails,
    drawn,
    gelu_inputs,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"
)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_and_grn_agree_with_the_reference(shape, dtype):
    check_gelu(gpu, *gelu_inputs(shape, dtype, DEVICE))


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_where_its_tails_are_all_there_is(dtype):
    check_tails(gpu, dtype, DEVICE)


@on_device
def test_gelu_is_exact_to_fp32():
    check_exactness(gpu, DEVICE)


@on_device
@pytest.mark.parametrize("size", [100.0, 1e4, 1e15])
def test_gelu_of_huge_values_stays_finite(size):
    check_huge(gpu, size, DEVICE)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_layer_norm_agrees_with_the_reference(shape, dtype):
    check_norm(gpu, shape, dtype, DEVICE)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_agrees_with_the_reference(dtype):
    """The kernels as `mlp` puts them together, with the shortcut in fp32 as under autocast."""
    rows, c, groups = 2 * 19, 24, 2
    shortcut, y, grad = (drawn(rows, c, seed=seed, device=DEVICE) for seed in (1, 2, 3))
    square = [drawn(4 * c, c, dtype=dtype, spread=c**-0.5, device=DEVICE), drawn(c, 4 * c, dtype=dtype, device=DEVICE)]
    narrow = [drawn(n, seed=n, device=DEVICE) for n in (c, c, 4 * c, 4 * c, 4 * c, c)]
    w = Weights(*narrow[:2], square[0], narrow[2].to(dtype), *narrow[3:5], square[1], narrow[5].to(dtype))
    made = []
    for kernels in (gpu, reference):
        out, *kept = mlp.forward(kernels, shortcut, y, w, groups)
        made.append((out, *mlp.backward(kernels, grad, y, w, *kept)))
    for ours, theirs in zip(*made, strict=True):
        assert ours.dtype == theirs.dtype
        close(ours, theirs, TOLERANCE[dtype])


@on_device
def test_repeats_bit_for_bit():
    check_repeats(gpu, DEVICE)


def test_every_row_belongs_to_one_chunk_and_the_chunks_fill_a_gpu():
    for g, n, f in [(256, 1216, 512), (256, 19, 4096), (1, 256 * 1216, 512), (1, 256 * 19, 4096), *SHAPES]:
        h = torch.empty(g, n, f, device="meta")
        for rows in (8, 16):
            cut = triton_rows._Cut.of(h, rows)
            _, chunks, _ = cut.partials
            _, _, again, span = cut.sizes
            assert chunks == again and (chunks - 1) * span < n <= chunks * span and span % cut.tile["ROWS"] == 0
            assert cut.programs == g * chunks * -(-f // cut.tile["BLOCK"])
            assert g * n * f < 1e6 or 1000 <= cut.programs <= 2 * triton_rows.PROGRAMS, (g, n, f, cut)


if not INTERPRETED:

    @pytest.mark.slow
    def test_interpreted_on_the_cpu():
        """Every test above once more, in a process of its own: the interpreter is chosen when kernels are defined."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        env = os.environ | {"TRITON_INTERPRET": "1"}
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        passed = re.search(r"(\d+) passed", run.stdout)
        assert run.returncode == 0 and passed and "skipped" not in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]
        assert int(passed[1]) > len(DTYPES) * (len(SHAPES) + len(ROWS))

    @pytest.mark.slow
    @pytest.mark.parametrize("target", [("cuda", 80, 32), ("hip", "gfx942", 64)], ids=["ampere", "cdna3"])
    def test_compiles_for(target):
        """The interpreter runs what the compiler refuses. Pointers to fp32 where fp32 it is, bf16 elsewhere."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        sizes = {"n", "f", "c", "chunks", "span", "rows_total"}
        wide = {
            "scale",
            "shift",
            "slope",
            "sums",
            "products",
            "grads",
            "mean",
            "rstd",
            "weight",
            "bias",
            "dweight",
            "dbias",
        }
        kernels = [
            kernel
            for module in (triton_rows, triton_norm)
            for name, kernel in vars(module).items()
            if name.startswith(("_gelu_", "_layer_norm"))
        ]
        assert len(kernels) == 5
        for kernel in kernels:
            for ones in (set(), {"n", "f", "c", "chunks", "rows_total"}):  # Triton takes a size of 1 for a constant
                constants = {"ROWS": 8, "BLOCK": 256} | dict.fromkeys(ones, 1)
                constants = {a: v for a, v in constants.items() if a in kernel.arg_names}
                kinds = {
                    a: "constexpr" if a in constants else "i32" if a in sizes else "*fp32" if a in wide else "*bf16"
                    for a in kernel.arg_names
                }
                source = ASTSource(kernel, kinds, constants)
                made = triton.compile(source, target=GPUTarget(*target), options={"enable_fp_fusion": True})
                assert made.asm["cubin" if target[0] == "cuda" else "hsaco"]
