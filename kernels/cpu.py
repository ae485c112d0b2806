"""C++ kernels for the CPU: compiled once for each instruction set and loaded through a C interface.

The library knows nothing of torch, so it builds in seconds and serves every torch version. It finds the OpenMP runtime
that torch has already loaded, and so runs on torch's own threads: a second pool would fight for the cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fcmae.kernels import reference
from fcmae.kernels.tiles import Tiles

SOURCE = Path(__file__).parent / "csrc" / "tile_conv.cpp"
TILE_SIZES = (8, 4, 2, 1)

# Compiler flags and vector bytes of each instruction set.
INSTRUCTION_SETS = {
    "avx512": (["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"], 64),
    "avx2": (["-mavx2", "-mfma"], 32),
    "portable": ([], 16),
}


def instruction_set() -> str:
    """The best set this machine runs, or what FCMAE_CPU (avx512, avx2, portable, none) says in the environment."""
    forced = os.environ.get("FCMAE_CPU")
    if forced:
        return forced
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The loaded kernels and what to call them, or None and the reason why there are none."""
    name = instruction_set()
    if name == "none":
        return None, "turned off by FCMAE_CPU=none"
    if name not in INSTRUCTION_SETS:
        return None, f"FCMAE_CPU={name} is none of {', '.join(INSTRUCTION_SETS)}, none"
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    try:
        return ctypes.CDLL(str(_build(name, compiler))), f"C++, {name}"
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, f"the C++ kernels were not built: {_reason(error)}"


def _build(name: str, compiler: str | None) -> Path:
    """The shared library for an instruction set, from the cache or newly compiled.

    Any number of processes may build at once: each writes its own file and renames it, so a reader sees a whole one.
    """
    flags, vector_bytes = INSTRUCTION_SETS[name]
    command = ["-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", *flags, f"-DFCMAE_BYTES={vector_bytes}"]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(command).encode() + platform.machine().encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fcmae"
    path = cache / f"kernels-{name}-{key[:16]}.so"
    if path.exists():
        return path
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (g++ or clang++)")
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fcmae: compiling the {name} CPU kernels, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / path.name
        subprocess.run([compiler, *command, str(SOURCE), "-o", str(made)], check=True, capture_output=True, text=True)
        os.replace(made, path)
    return path


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        wrong = [line for line in error.stderr.splitlines() if "error" in line]
        return (wrong or error.stderr.splitlines() or [str(error)])[0]
    return str(error)


def supports(x: Tensor, kernel_size: int) -> bool:
    """Whether the kernels take these tiles; otherwise the ops use the reference."""
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and kernel_size == 7
        and x.shape[2] == x.shape[3]
        and x.shape[2] in TILE_SIZES
        and x.numel() > 0
        and library()[0] is not None
    )


def tile_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """`reference.tile_conv` in C++ where it `supports` the input."""
    if not supports(x, weight.shape[-1]):
        return reference.tile_conv(x, weight, bias, tiles)
    wide, y = _fp32(x), torch.empty(x.shape, dtype=torch.float32)
    taps = _fp32(weight.reshape(weight.shape[0], 49).t())
    bias = None if bias is None else _fp32(bias)
    # The pointers' tensors have names here, and so outlive the call.
    _call("fcmae_tile_conv", x.shape, tiles, wide, taps, bias, y)
    return y.to(x.dtype)


def tile_conv_weight_grad(x: Tensor, grad: Tensor, k: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """`reference.tile_conv_weight_grad` in C++ where it `supports` the input."""
    if not supports(x, k):
        return reference.tile_conv_weight_grad(x, grad, k, tiles)
    c = x.shape[-1]
    wide, wide_grad, partial = _fp32(x), _fp32(grad), torch.empty(x.shape[0], 50, c, dtype=torch.float32)
    _call("fcmae_tile_conv_weight_grad", x.shape, tiles, wide, wide_grad, partial)
    total = partial.sum(0)  # one partial sum an image, added in order
    return total[:49].t().reshape(c, 1, 7, 7).contiguous(), total[49].clone()


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _call(name: str, shape: torch.Size, tiles: Tiles, *tensors: Tensor | None) -> None:
    b, k, t, _, c = shape
    keep, slot = tiles.keep.contiguous(), tiles.slot.contiguous()
    pointers = [ctypes.c_void_p(0 if a is None else a.data_ptr()) for a in (*tensors, keep, slot)]
    sizes = [ctypes.c_int64(n) for n in (b, k, *tiles.grid, c)]
    status = getattr(library()[0], name)(*pointers, *sizes, t, torch.get_num_threads())
    assert status == 0, f"{name} has no kernel for tiles of {t}"
