"""Checkpoints that are whole or absent: written aside, synced, renamed; every byte checked when read."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from fcmae.convert import check_archive, load_tensors
from fcmae.errors import UsageError

FORMAT = "fcmae-checkpoint-1"
_NAME = re.compile(r"step_(\d{9})\.pt")


def path_of(folder: Path, step: int) -> Path:
    """The file of the checkpoint taken after `step` optimizer steps."""
    return folder / f"step_{step:09d}.pt"


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    found = (_NAME.fullmatch(p.name) for p in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def write_whole(path: Path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, sync it and rename it onto `path`; remove it on failure.

    Raises UsageError with the system's reason (a full disk, say) when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # torch reports a failing file object as RuntimeError
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"could not write {path}: {str(error).splitlines()[0]}; earlier checkpoints are intact"
        ) from error


def save(folder: Path, payload: dict, keep_last: int, keep_multiple: int | None) -> Path:
    """Write `payload` (tensors and plain data, with its "step") and drop old checkpoints.

    The newest `keep_last` stay, and every one whose step is a multiple of `keep_multiple`.
    """
    path = path_of(folder, payload["step"])
    write_whole(path, lambda file: torch.save({"format": FORMAT, **payload}, file))
    for step in steps_in(folder)[:-keep_last]:
        if keep_multiple is None or step % keep_multiple:
            path_of(folder, step).unlink(missing_ok=True)
    return path


def read(path: Path) -> dict:
    """A checkpoint's payload on the CPU. Raises UsageError when it is damaged, foreign or would run code."""
    check_archive(path)
    payload = load_tensors(path)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise UsageError(f"{path} is not a checkpoint of this toolkit; only such a file can be resumed")
    return payload


def read_newest(folder: Path) -> tuple[dict | None, list[str]]:
    """The newest whole checkpoint of a folder (None without any) and one line for each newer one that was unreadable.

    Raises UsageError when there are checkpoints and none is whole.
    """
    complaints: list[str] = []
    for step in reversed(steps_in(folder)):
        try:
            return read(path_of(folder, step)), complaints
        except UsageError as error:
            complaints.append(f"{error}; falling back to the checkpoint before")
    if complaints:
        raise UsageError(
            f"none of the {len(complaints)} checkpoints in {folder} is readable; the newest: {complaints[0]}"
        )
    return None, complaints


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
