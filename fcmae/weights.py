"""Weights in files: reading any file or folder whose layout is known, without running code from it."""

from __future__ import annotations

import argparse
import json
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fcmae.checksum import read_safetensors
from fcmae.errors import UsageError
from fcmae.layouts import FAMILIES, Layout
from fcmae.layouts.sizes import Spec, Told
from fcmae.layouts.spec import read_spec
from fcmae.models.decoders import HEADS

# Under which names training scripts keep the weights among other things; the averaged ones with `ema`.
ENTRIES = ("model", "state_dict", "module")
EMA_ENTRIES = ("model_ema", "state_dict_ema", "ema")
WRAPPERS = ("module.", "_orig_mod.")  # what torch's wrappers put before every name
INNER = ("convnextv2.", "vit.")  # what transformers' classifiers put before an encoder's
CHECKPOINT = "fcmae-checkpoint-2"  # the format of a run's checkpoints
# Of no meaning to a model here: transformers' backbones normalize feature maps by the first, which nothing pretrains,
# and its `ViTModel` puts the second behind the class token, which no classifier uses.
IGNORED = ("hidden_states_norms.", "pooler.")
# Weights in a folder that transformers' `save_pretrained` wrote.
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Weights:
    """Weights as they were found and as this toolkit names them.

    state: in their layout. ours: in this toolkit's. training: the whole checkpoint, where it is one that a run can go
    on from. ignored: keys left out. told: what the file or its user says besides of a ViT.
    """

    path: Path
    layout: Layout
    state: dict[str, Tensor]
    ours: dict[str, Tensor]
    spec: Spec
    training: dict | None
    ignored: tuple[str, ...]
    told: Told = Told()


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The weights of `path` under this toolkit's names, ready for `model.load_state_dict(..., strict=True)`.

    path: a run folder of this toolkit or one of its checkpoints, a file of the authors' pretraining or dense model,
    timm's or transformers' weights (a file, or the folder that `save_pretrained` wrote); torch files or safetensors. A
    file without a decoder gives the encoder alone, one of a fine-tuned model the classifier besides (`norm.*` of a
    ConvNet, `head.*`, of a ViT that averages its tokens `fc_norm.*`). Raises UsageError for a file that is damaged, of
    an unknown layout, or not whole.
    """
    return read_weights(path).ours


def read_weights(path: str | Path, ema: bool = False, told: Told | None = None) -> Weights:
    """The same with what there is to know about it. ema: take the file's averaged weights; told: by the user."""
    path = Path(path)
    data = _load(path)
    state = _entry(data, path, ema)
    if not state or not all(isinstance(key, str) and isinstance(x, Tensor) for key, x in state.items()):
        raise UsageError(f"{path} holds no state dict of tensors")
    while wrapper := next((w for w in WRAPPERS if all(key.startswith(w) for key in state)), None):
        state = {key.removeprefix(wrapper): x for key, x in state.items()}
    for inner in INNER:
        bare = {key.removeprefix(inner): x for key, x in state.items()}
        if len(bare) < len(state):
            raise UsageError(f"{path} has keys that differ in {inner!r} alone: it is not told which are meant")
        state = bare
    ignored = tuple(key for key in state if key.startswith(IGNORED))
    state = {key: x for key, x in state.items() if key not in ignored}
    layout = recognise(state, path)
    ours = layout.to_fcmae(state)
    training = data if data.get("format") == CHECKPOINT else None
    own = FAMILIES[layout.family]["fcmae"]
    if training is not None and own.recognises(state):  # the authors' MAE has the same keys
        layout = own
    of_file = _told_by_run(training) if training is not None else _told_by_folder(path)
    told = _agreed(told or Told(), of_file, path)
    return Weights(path, layout, state, ours, read_spec(ours, str(path), told), training, ignored, told)


def recognise(state: dict[str, Tensor], where: str | Path) -> Layout:
    """The layout whose keys these are. Raises UsageError with the first keys and the nearest layout."""
    layouts = [layout for family in FAMILIES.values() for layout in family.values()]
    for layout in layouts:
        if layout.recognises(state):
            return layout
    known = [sum(layout.names.ours(key) is not None for key in state) for layout in layouts]
    nearest = layouts[known.index(max(known))]
    hint = f"; the nearest is {nearest.name}, with {max(known)} of {len(state)} keys" if max(known) else ""
    raise UsageError(f"{where} is of an unknown layout; its first keys are {', '.join(sorted(state)[:3])}{hint}")


def load_tensors(path: str | Path) -> dict:
    """What a `.safetensors` or torch file holds, on the CPU, without running any code from it.

    Raises UsageError when the file is missing, damaged, or a pickle that holds more than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        # The authors' scripts save their command line beside the weights: a Namespace, plain data.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange pickles; what is wrong with them is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path} is no torch file, or holds more than tensors and plain data, which is refused: it could run code"
        ) from None
    except Exception as error:  # of damaged bytes the readers may raise anything
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UsageError(f"{path} is not a whole safetensors or weights-only torch file: {reason}") from None


def check_archive(path: str | Path) -> None:
    """Hold every byte of a torch checkpoint against its zip archive's CRC-32; UsageError if one differs."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # of damaged bytes zipfile and its decompressors raise nearly anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{path} is not a whole checkpoint: {reason[0]}") from None
    if bad is not None:
        raise UsageError(f"{path} is damaged: the checksum of {bad} does not match")


def _load(path: Path) -> dict:
    """The content of a file, or of a folder's newest checkpoint or weights."""
    if not path.is_dir():
        return _load_file(path)
    if (path / "checkpoints").is_dir():
        from fcmae.train.checkpoint import find_newest

        newest, unreadable = find_newest(path / "checkpoints")
        if newest is None:
            raise UsageError(f"{path} is a run without a checkpoint yet")
        for line in unreadable:
            print(f"warning: {line}; falling back to the checkpoint before", flush=True)
        return load_tensors(newest)
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return _load_file(path / name)
        if (path / f"{name}.index.json").is_file():
            return {key: x for shard in _shards(path / f"{name}.index.json") for key, x in _load_file(shard).items()}
    raise UsageError(f"{path} is a folder without checkpoints/, model.safetensors or pytorch_model.bin; name a file")


def _is_archive(path: Path) -> bool:
    with open(path, "rb") as file:  # as torch decides it; zipfile's own question raises of some damaged files
        return file.read(4) == b"PK\x03\x04"


def _load_file(path: Path) -> dict:
    if path.is_file() and _is_archive(path):
        check_archive(path)
    return load_tensors(path)


def _shards(index: Path) -> list[Path]:
    """The files that transformers' index names, in its own folder."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        return [index.parent / Path(name).name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is no index of weights: {error}") from None


def _agreed(given: Told, found: Told, path: Path) -> Told:
    """What the user says, or else the file. Raises UsageError where they differ."""
    for name, one, two in zip(Told._fields, given, found, strict=True):
        if None not in (one, two) and one != two:
            raise UsageError(f"{path} says {name.replace('_', ' ')}: {two}, not {one}")
    return Told(*(two if one is None else one for one, two in zip(given, found, strict=True)))


def _told_by_run(checkpoint: dict) -> Told:
    """From the configuration in a checkpoint of a run."""
    model = (checkpoint.get("config") or {}).get("model") or {}
    default = HEADS if model.get("decoder") == "vit" else None
    return Told(model.get("heads"), model.get("decoder_heads") or default, _pair(model.get("image_size")))


def _told_by_folder(path: Path) -> Told:
    """From the `config.json` of transformers beside its weights."""
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    if not file.is_file() or (path.is_file() and path.name not in FOLDER_FILES):
        return Told()
    try:
        found = json.loads(file.read_text())
        heads = found.get("num_attention_heads"), found.get("decoder_num_attention_heads")
        return Told(*heads, _pair(found.get("image_size")))
    except (ValueError, AttributeError, OSError) as error:
        raise UsageError(f"{file} is not what transformers writes: {error}") from None


def _pair(size: int | list[int] | None) -> tuple[int, int] | None:
    """An image size as (H, W), of a ConvNet's, which takes any, too."""
    return (size, size) if isinstance(size, int) else tuple(size) if size else None


def _entry(data: dict, path: Path, ema: bool) -> dict:
    """The state dict inside what a file holds."""
    for name in EMA_ENTRIES if ema else (*ENTRIES, *EMA_ENTRIES):
        if isinstance(data, dict) and isinstance(data.get(name), dict):
            return data[name]
    if ema:
        raise UsageError(f"{path} has no averaged weights ({', '.join(EMA_ENTRIES)})")
    return data if isinstance(data, dict) else {}
