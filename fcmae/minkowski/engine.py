"""MinkowskiEngine, imported where it is used, and what it can and cannot do here."""

from __future__ import annotations

import collections
import collections.abc
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from fcmae.errors import UsageError

BUILD = "make minkowski (without a checkout: python -m fcmae.minkowski.build)"


def load() -> ModuleType:
    """The installed engine. Raises UsageError, with the command that builds it, when there is none that works."""
    if "MinkowskiEngine" in sys.modules:
        return sys.modules["MinkowskiEngine"]
    spec = importlib.util.find_spec("MinkowskiEngine")
    if spec is None or spec.origin is None:  # a folder of that name, such as a clone of its repository, is no engine
        raise UsageError(
            f"sparse.backend=minkowski needs MinkowskiEngine, which is not installed: build it with {BUILD}, "
            f"or use sparse.backend=native"
        )
    collections.Sequence = collections.abc.Sequence  # 0.5.4 takes it from where Python 3.10 no longer has it
    try:
        with _contained(os.path.dirname(spec.origin)):
            return importlib.import_module("MinkowskiEngine")
    except (ImportError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"the installed MinkowskiEngine does not load with torch {torch.__version__} ({reason}): "
            f"build it again with {BUILD}"
        ) from None


@contextmanager
def _contained(folder: str) -> Iterator[None]:
    """What importing the engine does to a process besides, undone: it looks for its own modules as top-level ones, sets
    OMP_NUM_THREADS, and warns that it was built for the CPU, which the head of a run says."""
    path, threads = list(sys.path), os.environ.get("OMP_NUM_THREADS")
    sys.path.insert(0, folder)  # before a user's modules of the same names
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = path
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)


def describe() -> str:
    """The engine's version, how it was built and which depthwise convolution it has."""
    me = load()
    depthwise = "its own" if hasattr(me, "MinkowskiDepthwiseConvolution") else "channelwise"
    built = "CUDA" if me.is_cuda_available() else "CPU"
    return f"MinkowskiEngine {me.__version__}, {built} build, {depthwise} depthwise"


def check_device(device: torch.device) -> None:
    """Raises UsageError where the installed engine cannot compute on `device`."""
    me = load()
    if device.type == "cpu" and hasattr(me, "MinkowskiDepthwiseConvolution"):
        raise UsageError(
            "the installed MinkowskiEngine is the authors' fork, whose depthwise convolution has CUDA code only: use "
            "device=cuda, sparse.backend=native, or the published engine: " + BUILD
        )
    if device.type == "cpu" or (device.type == "cuda" and me.is_cuda_available()):
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
