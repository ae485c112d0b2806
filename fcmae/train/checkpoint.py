"""Checkpoints that are whole or absent, every byte checked when read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from fcmae.errors import UsageError
from fcmae.files import write_whole
from fcmae.schema import CheckpointConfig
from fcmae.weights import CHECKPOINT, check_archive, load_tensors

_NAME = re.compile(r"step_(\d{9})\.pt")


def path_of(folder: Path, step: int) -> Path:
    """The file of the checkpoint taken after `step` optimizer steps."""
    return folder / f"step_{step:09d}.pt"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    found = (_NAME.fullmatch(p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def save(folder: Path, payload: dict, settings: CheckpointConfig) -> Path:
    """Write `payload` (tensors and plain data, with its "step") and drop old checkpoints.

    The newest `keep_last` stay, the newest `keep_last` of those taken every so many steps, so that one which a signal
    asked for takes no other's place, and every `keep_every`-th of these; all while steps are being skipped. Files of
    later steps go: the run came back to this step.
    """
    step = payload["step"]
    path = path_of(folder, step)
    write_whole(path, lambda file: torch.save({"format": CHECKPOINT, **payload}, file))
    found = [s for s in steps_in(folder) if s <= step]
    regular = [s for s in found if s % settings.every == 0]
    kept = {*found[-settings.keep_last :], *regular[-settings.keep_last :]}
    if payload.get("skipped_in_a_row"):
        kept |= set(found)  # what is wrong may have begun before them all
    if settings.keep_every is not None:
        kept |= {s for s in regular if s and s % (settings.every * settings.keep_every) == 0}
    drop(folder, lambda other: other not in kept)
    return path


def drop(folder: Path, unwanted: Callable[[int], bool]) -> None:
    """Remove the checkpoints of unwanted steps."""
    for step in filter(unwanted, steps_in(folder)):
        path_of(folder, step).unlink(missing_ok=True)


def read(path: Path) -> dict:
    """A checkpoint's payload on the CPU. Raises UsageError when it is damaged, foreign or would run code."""
    check_archive(path)
    payload = load_tensors(path)
    found = payload.get("format") if isinstance(payload, dict) else None
    if isinstance(found, str) and found != CHECKPOINT and found.startswith("fcmae-checkpoint-"):
        raise UsageError(
            f"{path} is of another version of this toolkit ({found}); its weights alone can be taken: init="
        )
    if found != CHECKPOINT:
        raise UsageError(f"{path} is not a checkpoint of this toolkit; only such a file can be resumed")
    return payload


def find_newest(folder: Path, every: int = 1) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a folder (None without any) and why each one that comes before it was passed over.

    Those whose step is a multiple of `every` come before the others. Raises UsageError when there are checkpoints and
    none is whole.
    """
    unreadable: list[str] = []
    for step in sorted(steps_in(folder), key=lambda step: (step % every == 0, step), reverse=True):
        try:
            read(path_of(folder, step))
            return path_of(folder, step), unreadable
        except UsageError as error:
            unreadable.append(str(error))
    if unreadable:
        raise UsageError(
            f"none of the {len(unreadable)} checkpoints in {folder} can be read (the newest: {unreadable[0]}); "
            f"restore one, or start anew with another out=..."
        )
    return None, unreadable
