"""`.safetensors` files with a checksum over their tensors, which the format itself lacks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fcmae.errors import UsageError
from fcmae.files import write_whole

# An entry of the file's metadata; its name says what it is of and how, so that a reader may know others besides.
KEY = "fcmae.tensors.sha256"


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, in the order of their names.

    It does not cover where tensors lie in the file, nor the file's other metadata.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        found.update(json.dumps([name, str(x.dtype).removeprefix("torch."), list(x.shape)]).encode())
        found.update(x.flatten().view(torch.uint8).numpy())
    return f"sha256:{found.hexdigest()}"


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write contiguous tensors as a `.safetensors` file with their `checksum`, whole or not at all.

    Equal tensors make equal files.
    """
    data = memoryview(save(tensors, metadata={"format": "pt", KEY: checksum(tensors)}))
    size = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + size]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors writes it in random order
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    head = len(text).to_bytes(8, "little") + text
    write_whole(path, lambda file: (file.write(head), file.write(data[8 + size :])))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, on the CPU; a file without a checksum is taken as it is.

    Raises UsageError where the checksum does not match, and for damaged bytes whatever safetensors raises.
    """
    with safe_open(path, "pt") as file:
        told = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    # Nearly so named, too, that damage to the name does not hide damage to the tensors.
    found = [value for key, value in told.items() if len(key) == len(KEY) and _differing(key) < 4]
    if found and found != [checksum(tensors)]:
        raise UsageError(f"{path} is damaged: the checksum of its tensors does not match")
    return tensors


def _differing(key: str) -> int:
    return sum(a != b for a, b in zip(key, KEY, strict=True))
