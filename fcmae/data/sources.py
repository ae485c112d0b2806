"""Where images come from: one setting names a folder, list, tar shards, Hugging Face folder or the sample."""

from __future__ import annotations

import csv
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from fcmae.data.decode import BrokenImage, decode, extensions, read_image
from fcmae.errors import UsageError

LIST_EXTENSIONS = (".txt", ".csv", ".tsv")
SHARD_EXTENSIONS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
LIST_COLUMNS = ("path", "file", "filename", "image")


class Source(Protocol):
    """A fixed, ordered collection of images, the same for every process that opens it."""

    def __len__(self) -> int: ...

    def load(self, i: int) -> Tensor:
        """Image i as (C, H, W), uint8 or float32. Raises BrokenImage."""

    def name(self, i: int) -> str:
        """What to call image i in messages: its path, tar member or row."""


def open_source(spec: str, in_chans: int) -> Source:
    """Open `data.source`: `sample`, an image folder, a .txt/.csv/.tsv list, tar shards, a `datasets` folder.

    Tar shards are one .tar, a glob (`dir/*.tar`), a brace range (`train-{000..015}.tar`) or a folder of .tar
    files. Raises UsageError for a path that is missing, empty or unreadable.
    """
    if not spec:
        raise UsageError("data.source is not set; give a folder, a .txt/.csv list, .tar shards, or `sample`")
    if spec == "sample":
        from fcmae.data.sample import SamplePhotos

        return SamplePhotos(in_chans)
    path = os.path.abspath(os.path.expanduser(spec))
    try:
        if os.path.isdir(path):
            return _open_folder(path, in_chans)
        if os.path.isfile(path) and path.lower().endswith(LIST_EXTENSIONS):
            return _open_list(path, in_chans)
        if path.lower().endswith(SHARD_EXTENSIONS):
            return _open_shards(_expand(path), in_chans)
    except OSError as error:
        raise UsageError(f"data.source: {error.filename or path}: {error.strerror or error}") from error
    if os.path.isfile(path):
        raise UsageError(f"data.source={spec} is no list (.txt, .csv, .tsv) or .tar; give a folder")
    raise UsageError(f"data.source={spec} does not exist (looked for {path})")


class PathTable:
    """Many strings in one buffer. Worker processes share it, where a list of a million str would be copied
    page by page as reference counts change."""

    def __init__(self, paths: Iterable[str]):
        buffer, ends = bytearray(), [0]
        for path in paths:
            buffer += os.fsencode(path)
            ends.append(len(buffer))
        self.buffer = np.frombuffer(bytes(buffer), dtype=np.uint8)
        self.ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(self.buffer[self.ends[i] : self.ends[i + 1]].tobytes())


class ImageFiles:
    """Image files of a folder or a list: paths relative to `root`, or absolute."""

    def __init__(self, root: str, paths: PathTable, in_chans: int):
        self.root, self.paths, self.in_chans = root, paths, in_chans

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, i: int) -> Tensor:
        return read_image(self.name(i), self.in_chans)

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.paths[i])


def _open_folder(root: str, in_chans: int) -> Source:
    held = set(os.listdir(root))
    if "dataset_dict.json" in held or {"dataset_info.json", "state.json"} <= held:
        return HuggingFaceImages(root, in_chans)
    wanted = extensions(in_chans)
    shards = sorted(os.path.join(root, name) for name in held if name.lower().endswith(".tar"))
    files = PathTable(walk(root, wanted))
    if files and shards:
        raise UsageError(
            f"{root} holds both images and .tar files; give '{os.path.join(root, '*.tar')}' for the shards, "
            f"or move them away for the {len(files)} images"
        )
    if shards:
        return _open_shards(shards, in_chans)
    if not files:
        raise UsageError(f"no images in {root} or below (looked for {' '.join(wanted)}; in_chans={in_chans})")
    return ImageFiles(root, files, in_chans)


def walk(root: str, wanted: tuple[str, ...]) -> Iterator[str]:
    """Paths, relative to `root`, of the files with a wanted extension, any depth, in one fixed order.

    Hidden entries are skipped. Links to folders are followed; each real folder is read once, so loops end.
    """
    seen: set[tuple[int, int]] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        status = os.stat(os.path.join(root, folder))
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        visible.sort(key=lambda entry: os.fsencode(entry.name))
        below = []
        for entry in visible:
            path = os.path.join(folder, entry.name)
            # entry.is_dir() raises on a link to itself, os.path.isdir does not.
            if entry.is_dir(follow_symlinks=False) or entry.is_symlink() and os.path.isdir(entry.path):
                below.append(path)
            elif entry.name.lower().endswith(wanted):
                yield path
        folders += reversed(below)


def _open_list(path: str, in_chans: int) -> Source:
    entries = _list_entries(path)
    if not entries:
        raise UsageError(f"the list {path} names no images; write one path a line")
    root = os.path.dirname(path)
    files = ImageFiles(root, PathTable(entry for _, entry in entries), in_chans)
    chunks = [range(len(files))[start : start + 1024] for start in range(0, len(files), 1024)]
    # On a network file system each look-up waits for the server: many at a time.
    with ThreadPoolExecutor(32) as pool:
        absent = pool.map(lambda chunk: [i for i in chunk if not os.path.isfile(files.name(i))], chunks)
        missing = list(itertools.chain.from_iterable(absent))
    if missing:
        line, entry = entries[missing[0]]
        hint = ""
        if line == 1 and path.lower().endswith((".csv", ".tsv")):
            hint = f"; if line 1 is a header, call the column of paths one of {', '.join(LIST_COLUMNS)}"
        raise UsageError(
            f"{path} line {line}: no file {os.path.join(root, entry)} ({len(missing)} of {len(entries)} missing){hint}"
        )
    return files


def _list_entries(path: str) -> list[tuple[int, str]]:
    """(line number, path as written) of each entry of a list."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.lower().endswith(".txt"):
            return [(n, line.strip()) for n, line in enumerate(file, 1) if line.strip()]
        reader = csv.reader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",")
        try:
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
        except csv.Error as error:
            raise UsageError(f"{path} line {reader.line_num}: {error}") from error
    column = 0
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    named = [header.index(name) for name in LIST_COLUMNS if name in header]
    if named:
        column, rows = named[0], rows[1:]
    for line, row in rows:
        if column >= len(row) or not row[column].strip():
            raise UsageError(f"{path} line {line}: column {column + 1}, the image's path, is empty")
    return [(line, row[column].strip()) for line, row in rows]


def _open_shards(paths: list[str], in_chans: int) -> Source:
    from fcmae.data.shards import TarShards

    return TarShards(paths, in_chans)


def _expand(spec: str) -> list[str]:
    """The .tar files that a path, a glob or a brace range such as `train-{000..015}.tar` stands for."""
    found: list[str] = []
    for path in _braces(spec):
        if not glob.has_magic(path) or os.path.exists(path):
            found.append(path)
            continue
        matches = sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UsageError(f"no file matches {path}")
        found += matches
    missing = [path for path in found if not os.path.isfile(path)]
    if missing:
        of = f" ({len(missing)} of {len(found)} shards missing)" if len(found) > 1 else ""
        raise UsageError(f"no file {missing[0]}{of}")
    return found


def _braces(spec: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if not match:
        return [spec]
    first, last = match.groups()
    if int(first) > int(last):
        raise UsageError(f"the range {match.group()} in {spec} runs backwards")
    width = len(first) if first.startswith("0") else 0
    numbers = (str(n).zfill(width) for n in range(int(first), int(last) + 1))
    return [path for n in numbers for path in _braces(spec[: match.start()] + n + spec[match.end() :])]


class HuggingFaceImages:
    """A folder written by `datasets.Dataset.save_to_disk`; of a DatasetDict the split "train"."""

    def __init__(self, root: str, in_chans: int):
        try:
            import datasets
        except ImportError as error:
            raise UsageError(f'{root} is a Hugging Face folder: pip install "fcmae[hf]"') from error
        try:
            data = datasets.load_from_disk(root)
        except Exception as error:  # arrow and datasets raise many types on a damaged folder
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"{root} is not a readable Hugging Face folder: {reason}") from error
        if isinstance(data, datasets.DatasetDict):
            if "train" not in data:
                raise UsageError(f"{root} has no split 'train'; give one of its folders: {', '.join(data)}")
            data = data["train"]
        columns = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
        if not columns:
            raise UsageError(f"{root} has no column of type Image, only: {', '.join(data.features)}")
        if not len(data):
            raise UsageError(f"{root} has no rows")
        self.root, self.in_chans, self.column = root, in_chans, columns[0]
        data = data.with_format(None).select_columns([self.column])
        self.data = data.cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.data)

    def load(self, i: int) -> Tensor:
        cell = self.data[i][self.column]
        if cell and cell["bytes"] is not None:
            return decode(cell["bytes"], self.in_chans, self.name(i))
        if cell and cell["path"]:
            return read_image(str(Path(self.root, cell["path"])), self.in_chans)
        raise BrokenImage(self.name(i), "the row has no image")

    def name(self, i: int) -> str:
        return f"{self.root}[{i}]"
