"""Folders as every node sees them: relative paths made absolute, the run's folder writable and shared."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fcmae import config as settings
from fcmae.errors import UsageError

# The last part of every setting that may name a file or a folder.
PATH_SETTINGS = ("out", "init", "resume", "source", "labelled", "train", "val", "test")
NO_VALUE = ("", "null", "~")

# What no other machine sees, and what it may see if this is the machine that serves it.
MEMORY = ("tmpfs", "ramfs", "overlay", "devtmpfs", "rootfs")
DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs")
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def absolute_overrides(config: str, overrides: list[str]) -> list[str]:
    """The overrides with absolute paths, after those that make the config file's own relative paths absolute.

    Paths count from the current folder, in the file too, as when the task runs there. Raises UsageError for a config
    file that cannot be read.
    """
    own, given = settings.flatten(settings.read_yaml(Path(config))), {text.partition("=")[0] for text in overrides}
    own = [f"{key}={value}" for key, value in own.items() if isinstance(value, str) and _is_path(key, value)]
    relative = [text for text in own if _absolute(text) != text and text.partition("=")[0] not in {"out", *given}]
    return [_absolute(text) for text in [*relative, *overrides]]


def out_of(config: str, overrides: list[str]) -> Path | None:
    """The run's folder: the last `out=`, or the config file's; None without any.

    Raises UsageError for one that cannot be known here, or that SLURM would take for something else.
    """
    given = [text[len("out=") :] for text in overrides if text.startswith("out=")]
    value = str(given[-1] if given else settings.read_yaml(Path(config)).get("out") or "")
    if value.lower() in NO_VALUE:
        return None
    for sign, why in (("%", "SLURM fills in in the names of logs"), ("${", "only the job itself could fill in")):
        if sign in value:
            raise UsageError(f"out={value} has {sign}, which {why}; choose a folder whose name is without it")
    return Path(_absolute(f"out={value}")[len("out=") :])


def _absolute(override: str) -> str:
    key, separator, value = override.partition("=")
    if not separator or not _is_path(key, value):
        return override
    return f"{key}={os.path.abspath(os.path.expanduser(value))}"


def _is_path(key: str, value: str) -> bool:
    named = key.rpartition(".")[2] in PATH_SETTINGS and value.lower() not in NO_VALUE
    other = "://" in value or "${" in value or (key == "data.source" and value == "sample")
    return named and not other


def check_shared(folder: Path, mounts: str | None = None) -> str | None:
    """A warning where the folder may be this machine's own, None where it lies on a network's file system.

    mounts: the text of /proc/mounts. Raises UsageError where no other machine can see it.
    """
    path = os.path.realpath(folder)
    kind = file_system(path, Path("/proc/mounts").read_text() if mounts is None else mounts)
    temporary = next((t for t in TEMPORARY if path == t or path.startswith(f"{t}/")), None)
    if kind in MEMORY or (temporary and kind in DISKS):
        where = f"under {temporary}" if temporary else f"on {kind}"
        raise UsageError(
            f"out={folder} is {where}, which every machine has its own of; choose a folder that all nodes share, or "
            f"add --not-shared if the job's nodes see this very one"
        )
    if kind in DISKS:
        return f"out={folder} is on a disk of this machine ({kind}): make sure that the nodes see it under this name"
    return None


def file_system(path: str, mounts: str) -> str:
    """The type of the file system that holds `path`, an absolute path without links."""
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # of several mounts on one point the last is seen
            best, kind = point, found
    return kind


def make_writable(folder: Path) -> None:
    """Make the folder, and write and remove a file in it. Raises UsageError when that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable") as file:
            file.write(b"x")
    except OSError as error:
        raise UsageError(f"cannot write into {folder}: {error.strerror}; choose another folder with out=...") from None
