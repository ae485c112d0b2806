"""Weights from one layout to another: `python -m fcmae.convert SRC DST --to {timm,fcmae,minkowski}`."""

from __future__ import annotations

import argparse
import pickle
import sys
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fcmae.errors import UsageError
from fcmae.files import write_whole
from fcmae.layouts import mae, minkowski, official, timm, training


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
        # The authors' scripts save their command line beside the weights: a Namespace, plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path} is no torch file, or holds more than tensors and plain data, which is refused: it could run code"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
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

    Known layouts: this toolkit's checkpoints and the authors' pretraining files of FCMAE (MinkowskiEngine layout) and
    MAE, bare or under a `model` entry. Raises UsageError for a file that is damaged or of an unknown layout, naming its
    first keys.
    """
    data = load_tensors(path)
    state = data["model"] if isinstance(data, dict) and isinstance(data.get("model"), dict) else data
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
        raise UsageError(f"{path} holds no state dict of tensors")
    if official.recognises(state):
        return official.to_fcmae(state)
    if mae.recognises(state):
        return state
    state = minkowski.to_fcmae(state)
    if "encoder.stem.0.weight" in state and "mask_token" in state:
        return state
    if "head.norm.weight" in state and "stem.0.weight" in state:
        raise UsageError(
            f"{path} holds an encoder in timm's layout alone; load it with timm.create_model(checkpoint_path=...)"
        )
    raise UsageError(f"{path} is of an unknown layout; its first keys are {', '.join(sorted(state)[:3])}")


def main(argv: list[str] | None = None) -> int:
    """The command: SRC is anything `read_checkpoint` takes; DST gets the dense encoder under timm's names."""
    parser = argparse.ArgumentParser("fcmae.convert", description=__doc__)
    parser.add_argument("src", type=Path, help="a checkpoint of this toolkit or of the authors' FCMAE pretraining")
    parser.add_argument("dst", type=Path, help="the file to write")
    parser.add_argument(
        "--to",
        choices=["timm", "fcmae", "minkowski"],
        default="timm",
        help="timm: the dense encoder, as .safetensors. fcmae, minkowski: the whole model in the layout of that "
        "backend; of a run's checkpoint everything, so that a run can go on from it (resume=DST)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite DST")
    arguments = parser.parse_args(argv)
    try:
        if arguments.dst.exists() and not arguments.force:
            raise UsageError(f"{arguments.dst} exists; choose another name or give --force")
        if arguments.to == "timm":
            tensors = timm.from_model(read_checkpoint(arguments.src))
            write_whole(arguments.dst, lambda file: file.write(save(tensors, metadata={"format": "pt"})))
        else:
            payload = in_layout(arguments.src, arguments.to)
            tensors = payload["model"]
            write_whole(arguments.dst, lambda file: torch.save(payload, file))
    except UsageError as error:
        print(f"fcmae.convert: error: {error}", file=sys.stderr)
        return 2
    parameters = sum(t.numel() for t in tensors.values())
    print(f"{arguments.dst}: {len(tensors)} tensors, {parameters:,} parameters, {arguments.to} layout")
    return 0


def in_layout(path: Path, name: str) -> dict:
    """A run's checkpoint, or `{"model": ...}` from other files, in the layout `fcmae` or `minkowski`."""
    layout = {"fcmae": minkowski.to_fcmae, "minkowski": minkowski.from_fcmae}[name]
    data = load_tensors(path)
    if isinstance(data, dict) and "optimizer" in data and "format" in data:
        return training.translate(data, layout)
    return {"model": layout(read_checkpoint(path))}


if __name__ == "__main__":
    sys.exit(main())
