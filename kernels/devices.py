"""Which module's kernels serve a device: `cpu` in C++, `gpu` in Triton, `reference` in plain PyTorch anywhere."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from fcmae.kernels import cpu, reference


def kernels_for(x: Tensor, native: bool) -> ModuleType:
    """The module to use for a tensor: the device's own if `native` asks for it and there is one."""
    if native and x.device.type == "cpu":
        return cpu
    return reference
