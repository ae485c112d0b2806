"""Files that are whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import BinaryIO

from fcmae.errors import UsageError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a file that takes the place of `path` once it is whole; see `aside`."""
    with aside(path) as part, _Remembering(FileIO(part, "wb")) as file:
        try:
            write(file)
        except RuntimeError:  # torch.save has one of its own for a file that fails
            if file.failed is None:
                raise
            raise file.failed from None


class _Remembering(BufferedWriter):
    """A file that remembers why it could not be written."""

    failed: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder at; synced and renamed onto `path` when the block ends well.

    Interrupted, or raising, it leaves `path` as it was; a folder that a kill caught between its two renames comes back
    at the next call. Raises UsageError with the system's reason (a full disk, say).
    """
    part = path.with_name(f".{path.stem}.part{path.suffix}")  # torch.export looks at a name's end
    old = path.with_name(f".{path.name}.fcmae-old")
    _bring_back(path, old)
    try:
        with writing(path):
            _remove(part)
            yield part
            for file in [part, *part.rglob("*")] if part.is_dir() else [part]:
                _sync(file)
            if path.is_dir() and not path.is_symlink():  # no system replaces a full folder in one step
                os.replace(path, old)
            os.replace(part, path)
            _sync(path.parent)
    finally:
        _remove(part)
        _bring_back(path, old)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`. Raises UsageError with the system's reason for its OSError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"could not write {path}: {reason}; free some space or choose another folder") from error


def sweep(folder: Path) -> None:
    """Remove what kills left of files that were being written into a folder, which nobody else may write into now.

    The same file begun again takes the place of what was left of it; that may never happen.
    """
    for part in [*folder.glob(".*.part"), *folder.glob(".*.part.*")]:
        _remove(part)


def _bring_back(path: Path, old: Path) -> None:
    """End an exchange of folders: the old one goes where the new one came, and else back to its place."""
    if not old.is_dir():
        return
    if path.exists():
        shutil.rmtree(old)
    else:
        os.replace(old, path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
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
