"""Images inside tar files, read at random through an index that is made once per tar."""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
from collections import OrderedDict

import numpy as np
from torch import Tensor

from fcmae.data.decode import ARRAY_EXTENSIONS, PHOTO_EXTENSIONS, BrokenImage, check_bytes, decode, extensions
from fcmae.data.sources import PathTable
from fcmae.errors import UsageError
from fcmae.files import cache_folder

log = logging.getLogger(__name__)

INDEX_VERSION = 1
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MAX_OPEN = 64  # far below the usual limit of 1,024 open files


class TarShards:
    """The image members of several tars, in the order of `paths` and then of the members."""

    def __init__(self, paths: list[str], in_chans: int):
        self.paths, self.in_chans = paths, in_chans
        wanted = extensions(in_chans)
        names: list[str] = []
        shards, offsets, sizes = [], [], []
        for number, path in enumerate(paths):
            index = load_index(path)
            members = [os.fsdecode(name) for name in index["names"].tobytes().split(b"\0")[:-1]]
            fits = np.array([name.lower().endswith(wanted) for name in members], dtype=bool)
            names += [name for name, fit in zip(members, fits, strict=True) if fit]
            offsets.append(index["offsets"][fits])
            sizes.append(index["sizes"][fits])
            shards.append(np.full(int(fits.sum()), number, dtype=np.int32))
        if not names:
            where = paths[0] if len(paths) == 1 else f"{len(paths)} tar files such as {paths[0]}"
            raise UsageError(f"no images in {where}; looked for {' '.join(wanted)} (in_chans={in_chans})")
        self.members = PathTable(names)
        self.shards, self.offsets, self.sizes = map(np.concatenate, (shards, offsets, sizes))
        self._files: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

    def __len__(self) -> int:
        return len(self.members)

    def load(self, i: int) -> Tensor:
        size, offset = int(self.sizes[i]), int(self.offsets[i])
        check_bytes(size, self.name(i))
        try:
            data = os.pread(self._open(int(self.shards[i])), size, offset)
        except OSError as error:
            raise BrokenImage(self.name(i), error.strerror or str(error)) from error
        if len(data) != size:
            raise BrokenImage(self.name(i), f"the tar ends inside this member ({len(data)} of {size} bytes)")
        return decode(data, self.in_chans, self.name(i))

    def name(self, i: int) -> str:
        return f"{self.paths[self.shards[i]]}/{self.members[i]}"

    def _open(self, shard: int) -> int:
        """A descriptor of this process, the least recently used of MAX_OPEN closed first."""
        if self._owner != os.getpid():
            self._files, self._owner = OrderedDict(), os.getpid()
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self):
        if getattr(self, "_owner", None) == os.getpid():
            for file in self._files.values():
                os.close(file)


def load_index(path: str) -> dict[str, np.ndarray]:
    """The image members of a tar: names (uint8, each ended by a NUL), offsets and sizes (int64, bytes).

    Kept as `<tar>.idx.npz` beside the tar, or in the user's cache folder when that one is not writable, and
    made again when the tar's size or time of change differ. Raises UsageError for a compressed, truncated or
    foreign file.
    """
    status = os.stat(path)
    stamp = np.array([INDEX_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    places = (f"{path}.idx.npz", str(cache_folder() / f"{os.path.basename(path)}.{digest}.idx.npz"))
    for place in places:
        index = _read_index(place)
        if index is not None and np.array_equal(index["stamp"], stamp):
            return index
    log.info("indexing %s", path)
    index = {"stamp": stamp, **_scan(path)}
    if not any(_write_index(place, index) for place in places):
        log.warning("cannot keep the index of %s: neither %s nor %s is writable", path, *places)
    return index


def _read_index(place: str) -> dict[str, np.ndarray] | None:
    try:
        with np.load(place, allow_pickle=False) as file:
            return {key: file[key] for key in ("stamp", "names", "offsets", "sizes")}
    except Exception:  # missing, or damaged in any way: it is made again
        return None


def _write_index(place: str, index: dict[str, np.ndarray]) -> bool:
    """Several processes may write the same index at once: each writes its own file and renames it whole."""
    aside = f"{place}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    try:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(aside, "xb") as file:
            np.savez(file, **index)
        os.replace(aside, place)
    except OSError:
        if os.path.exists(aside):
            os.unlink(aside)
        return False
    return True


def _scan(path: str) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(0)
        for magic, kind in COMPRESSED.items():
            if head.startswith(magic):
                raise UsageError(f"{path} is compressed ({kind}): unpack it and make a plain .tar")
        found: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # tarfile keeps every header otherwise
                    name = member.name
                    if not name.lower().endswith(PHOTO_EXTENSIONS + ARRAY_EXTENSIONS):
                        continue
                    if any(part[0] == "." and part != "." for part in name.split("/") if part):
                        continue  # hidden, as in a folder
                    if member.islnk() and member.linkname in found:
                        found[name] = found[member.linkname]
                    elif member.isreg() and not member.issparse():
                        found[name] = (member.offset_data, member.size)
                end = tar.offset
        except tarfile.TarError as error:
            raise UsageError(f"{path} is truncated or not a tar ({error}); copy or make it again") from error
        # tarfile takes a cut or damaged header for the end, but a whole archive ends with blocks of zeros.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UsageError(f"{path} is truncated or damaged at byte {end}; copy or make it again")
    places = np.array(list(found.values()), dtype=np.int64).reshape(-1, 2)
    names = b"".join(os.fsencode(name) + b"\0" for name in found)
    return {"names": np.frombuffer(names, dtype=np.uint8), "offsets": places[:, 0], "sizes": places[:, 1]}
