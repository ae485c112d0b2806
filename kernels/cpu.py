"""The C++ kernels for the CPU, called through a C interface, with the functions of `reference`.

The library finds the OpenMP runtime that torch has already loaded, and so runs on torch's own threads: a second pool
would fight for the cores. What the kernels do not take goes to the reference.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess

import torch
from torch import Tensor

from fcmae.kernels import build, reference
from fcmae.kernels.tiles import STORAGE, Tiles, takes_tiles

STORAGE_CODES = {dtype: code for code, dtype in enumerate(STORAGE)}
RUN = 64  # rows whose sums a thread adds up at a time, as in csrc/rows.cpp
MLP_BYTES = 2 << 20  # of 4C activations that a chunk of the MLP holds for each thread: what its caches take


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
    if name not in build.INSTRUCTION_SETS:
        return None, f"FCMAE_CPU={name} is none of {', '.join(build.INSTRUCTION_SETS)}, none"
    try:
        return ctypes.CDLL(str(build.find_or_compile(name))), f"C++, {name}"
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, f"the C++ kernels were not built: {build.reason(error)}"


def supports(x: Tensor, kernel_size: int) -> bool:
    """Whether the convolution kernels take these tiles."""
    return takes_tiles(x, kernel_size) and library()[0] is not None


def tile_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """`reference.tile_conv` in C++."""
    if not supports(x, weight.shape[-1]):
        return reference.tile_conv(x, weight, bias, tiles)
    x, taps = x.contiguous(), _fp32(weight.reshape(weight.shape[0], 49).t())
    y, bias = torch.empty_like(x), None if bias is None else _fp32(bias)
    _call_conv("fcmae_tile_conv", x, tiles, x, taps, bias, y)
    return y


def tile_conv_weight_grad(x: Tensor, grad: Tensor, k: int, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """`reference.tile_conv_weight_grad` in C++."""
    if not supports(x, k) or grad.dtype != x.dtype:
        return reference.tile_conv_weight_grad(x, grad, k, tiles)
    c = x.shape[-1]
    x, grad, partial = (
        x.contiguous(),
        grad.contiguous(),
        torch.empty(x.shape[0], 50, c, dtype=torch.float32),
    )
    _call_conv("fcmae_tile_conv_weight_grad", x, tiles, x, grad, partial)
    total = partial.sum(0)  # one partial sum an image, added in order
    return total[:49].t().reshape(c, 1, 7, 7).contiguous(), total[49].clone()


def gelu_grn(h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, z: Tensor) -> Tensor:
    """`reference.gelu_grn` in C++."""
    if not _takes(h):
        return reference.gelu_grn(h, bias, gamma, beta, z)
    squares, scale = _per_group(h), _per_group(h)
    _call_rows("fcmae_gelu_grn", h, h, bias, gamma, beta, z, _per_run(h), scale, squares)
    return squares


def gelu_grn_backward(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, squares: Tensor, grad: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.gelu_grn_backward` in C++."""
    if not _takes(h):
        return reference.gelu_grn_backward(h, bias, gamma, beta, squares, grad, z)
    sums, slopes = torch.empty(3, h.shape[2], dtype=torch.float32), torch.empty_like(h)
    work = (slopes, _per_run(h), _per_run(h), _per_group(h), _per_group(h))
    _call_rows("fcmae_gelu_grn_backward", h, h, bias, gamma, beta, squares, grad, z, *work, sums)
    return sums[0].clone(), sums[1].clone(), sums[2].clone()


def layer_norm_backward(
    grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, normed: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.layer_norm_backward` in C++."""
    if not (_takes(y) and _takes(grad)):
        return reference.layer_norm_backward(grad, y, mean, rstd, weight, bias, dy, normed)
    sums = torch.empty(-(-y.shape[0] // RUN), 2, y.shape[1], dtype=torch.float32)
    tensors = (grad, y, mean, rstd, weight, bias, dy, normed, sums)
    _call("fcmae_layer_norm_backward", tensors, (*y.shape, STORAGE_CODES[y.dtype]), STORAGE_CODES[grad.dtype])
    return sums[:, 0].sum(0), sums[:, 1].sum(0)


def mlp_groups(rows: int, features: int, item_bytes: int) -> int:
    """How many groups of `rows` rows of the MLP one chunk takes, so that its 4C activations stay in the caches."""
    return max(1, MLP_BYTES * torch.get_num_threads() // (rows * features * item_bytes))


def _takes(h: Tensor) -> bool:
    return h.dtype in STORAGE and h.numel() > 0 and library()[0] is not None


def _per_group(h: Tensor) -> Tensor:
    return torch.empty(h.shape[0], h.shape[2], dtype=torch.float32)


def _per_run(h: Tensor) -> Tensor:
    return torch.empty(h.shape[0], -(-h.shape[1] // RUN), h.shape[2], dtype=torch.float32)


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _call_conv(name: str, x: Tensor, tiles: Tiles, *tensors: Tensor | None) -> None:
    b, k, t, _, c = x.shape
    keep, slot = tiles.keep.contiguous(), tiles.slot.contiguous()
    _call(name, (*tensors, keep, slot), (b, k, *tiles.grid, c, t), STORAGE_CODES[x.dtype])


def _call_rows(name: str, h: Tensor, *tensors: Tensor) -> None:
    _call(name, tensors, h.shape, STORAGE_CODES[h.dtype])


def _call(name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...], storage: int) -> None:
    pointers = [ctypes.c_void_p(0 if a is None else a.data_ptr()) for a in tensors]
    assert all(a is None or a.is_contiguous() for a in tensors), f"{name} takes contiguous tensors"
    status = getattr(library()[0], name)(*pointers, *map(ctypes.c_int64, sizes), storage, torch.get_num_threads())
    assert status == 0, f"{name} has no kernel for {sizes}, storage {storage}"
