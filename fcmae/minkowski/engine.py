"""MinkowskiEngine, imported where it is used, and what it can and cannot do here."""

from __future__ import annotations

import collections
import collections.abc
import importlib.util
import sys
import warnings
from types import ModuleType

import torch

from fcmae.errors import UsageError

BUILD = "make minkowski (without a checkout: python -m fcmae.minkowski.build)"


def load() -> ModuleType:
    """The installed engine. Raises UsageError, with the command that builds it, when there is none that works."""
    if "MinkowskiEngine" not in sys.modules and importlib.util.find_spec("MinkowskiEngine") is None:
        raise UsageError(
            f"sparse.backend=minkowski needs MinkowskiEngine, which is not installed: build it with {BUILD}, "
            f"or use sparse.backend=native"
        )
    collections.Sequence = collections.abc.Sequence  # 0.5.4 takes it from where Python 3.10 no longer has it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it was built for the CPU: the head of a run says so
            import MinkowskiEngine
    except (ImportError, OSError) as error:
        raise UsageError(
            f"the installed MinkowskiEngine does not load with torch {torch.__version__} "
            f"({str(error).splitlines()[0]}): build it again with {BUILD}"
        ) from None
    return MinkowskiEngine


def describe() -> str:
    """The engine's version, how it was built and which depthwise convolution it has."""
    me = load()
    depthwise = "its own" if hasattr(me, "MinkowskiDepthwiseConvolution") else "channelwise"
    built = "CUDA" if me.is_cuda_available() else "CPU"
    return f"MinkowskiEngine {me.__version__}, {built} build, {depthwise} depthwise"


def check_device(device: torch.device) -> None:
    """Raises UsageError where the installed engine cannot compute on `device`."""
    if device.type == "cpu" or (device.type == "cuda" and load().is_cuda_available()):
        return
    built = "was built for the CPU alone" if device.type == "cuda" else "has CPU and CUDA code only"
    raise UsageError(
        f"the installed MinkowskiEngine {built}, and the device is {device.type}: use device=cpu or "
        f"sparse.backend=native, or build it on a machine with CUDA: {BUILD}"
    )


def check_dtype(dtype: torch.dtype) -> None:
    """Raises UsageError unless MinkowskiEngine computes in `dtype`: float32 and float64."""
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"MinkowskiEngine computes in fp32 (or float64) only, not {str(dtype).removeprefix('torch.')}: "
            f"use train.precision=fp32 or sparse.backend=native"
        )
