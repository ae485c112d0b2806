"""Which module's kernels serve a device: `cpu` in C++, `gpu` in Triton, `reference` in plain PyTorch anywhere."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

from fcmae.kernels import cpu, reference

OLDEST_NVIDIA = (8, 0)  # Ampere


def kernels_for(device: torch.device, native: bool) -> ModuleType:
    """The module to use for tensors on a device: the device's own if `native` asks for it and there is one."""
    if native and device.type == "cpu":
        return cpu
    if native and device.type == "cuda" and triton_on(device)[0]:
        from fcmae.kernels import gpu

        return gpu
    return reference


@functools.cache
def triton_on(device: torch.device) -> tuple[bool, str]:
    """Whether a GPU runs the Triton kernels, and what to call them or why it does not."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed"
    name = torch.cuda.get_device_name(device)
    if not torch.version.hip and torch.cuda.get_device_capability(device) < OLDEST_NVIDIA:
        return False, f"{name} is older than Ampere, which the Triton kernels need"
    from fcmae.kernels import gpu

    try:  # Triton compiles its launcher with a C compiler, which may be missing, and knows only some AMD cards
        ones = torch.ones(1, 1, 16, device=device)
        gpu.gelu_grn(ones, ones[0, 0], ones[0, 0], ones[0, 0], torch.empty_like(ones))
    except Exception as error:  # whatever it is, the reference still runs
        return False, f"Triton does not run on {name}: {str(error).strip().splitlines()[0] if str(error) else error!r}"
    return True, f"Triton, {name}"


def active(device: torch.device) -> str:
    """What the `native` backend runs on a device, such as "C++, avx2"; may compile the CPU kernels."""
    if device.type == "cpu":
        found, what = cpu.library()
    elif device.type == "cuda":
        found, what = triton_on(device)
    else:
        found, what = None, f"no kernels for {device.type}"
    return what if found else f"PyTorch reference ({what})"
