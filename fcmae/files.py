"""Files that are whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fcmae.errors import UsageError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a file that takes the place of `path` once it is whole; see `aside`."""
    with aside(path) as part, open(part, "wb") as file:
        try:
            write(file)
        except RuntimeError as error:  # how torch.save reports a failing file
            raise OSError(str(error).splitlines()[0]) from error


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder at; synced and renamed onto `path` when the block ends well.

    Interrupted, or raising, it leaves `path` as it was. Raises UsageError with the system's reason (a full disk, say).
    """
    part, old = (path.with_name(f".{path.name}.{kind}") for kind in ("part", "old"))
    try:
        _remove(part)
        yield part
        for file in [part, *part.rglob("*")] if part.is_dir() else [part]:
            _sync(file)
        if path.is_dir():  # no system replaces a full folder in one step
            _remove(old)
            os.replace(path, old)
        os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"could not write {path}: {reason}; free some space or choose another folder") from error
    finally:
        _remove(part)
        if path.exists():
            _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where things that can be made again are kept: $XDG_CACHE_HOME/fcmae, or ~/.cache/fcmae."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fcmae"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
