"""Weights in: any known layout as the state dict that our models load strictly."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fcmae.errors import UsageError
from fcmae.layouts import official


def load_tensors(path: str | Path) -> dict:
    """What a `.safetensors` or torch file holds, on the CPU, without running any code from it.

    Raises UsageError when the file is missing, damaged, or a pickle that holds more than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} is not a whole safetensors or weights-only torch file: {reason}") from None


def check_archive(path: str | Path) -> None:
    """Hold every byte of a torch checkpoint against its zip archive's CRC-32; UsageError if one differs."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} is not a whole checkpoint: {error}") from None
    if bad is not None:
        raise UsageError(f"{path} is damaged: the checksum of {bad} does not match")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights of `path` under this toolkit's names, ready for `model.load_state_dict(..., strict=True)`.

    Known layouts: this toolkit's checkpoints and the authors' FCMAE pretraining files (MinkowskiEngine layout), bare or
    under a `model` entry. Raises UsageError for a file that is damaged or of an unknown layout, naming its first keys.
    """
    data = load_tensors(path)
    state = data["model"] if isinstance(data, dict) and isinstance(data.get("model"), dict) else data
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
        raise UsageError(f"{path} holds no state dict of tensors")
    if official.recognises(state):
        return official.to_fcmae(state)
    if "encoder.stem.0.weight" in state and "mask_token" in state:
        return state
    raise UsageError(f"{path} is of an unknown layout; its first keys are {', '.join(sorted(state)[:3])}")
