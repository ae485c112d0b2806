"""Files that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fcmae.errors import UsageError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file beside `path`, sync it and rename it onto `path`; remove it on failure.

    Raises UsageError with the system's reason (a full disk, say) when it cannot be written; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a failing file as RuntimeError
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UsageError(f"could not write {path}: {reason}; free some space or choose another folder") from error


def cache_folder() -> Path:
    """Where things that can be made again are kept: $XDG_CACHE_HOME/fcmae, or ~/.cache/fcmae."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fcmae"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
