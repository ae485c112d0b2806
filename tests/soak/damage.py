"""Ways in which a file is damaged, each drawn from a seeded generator."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path


def truncated(data: bytes, rng: random.Random) -> bytes:
    """The end is missing: most of the file, half of it, or a few bytes."""
    most = rng.choice([len(data), len(data), 4096, 64])
    return data[: max(0, len(data) - rng.randint(1, min(most, len(data))))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """One bit to 32 of them, anywhere."""
    return _flip(data, rng, [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 1, 2, 8, 32]))])


def flipped_in_headers(data: bytes, rng: random.Random) -> bytes:
    """The same near the beginning or the end, where archives keep their headers and their directory."""
    near = min(len(data), rng.choice([64, 512, 8192]))
    first = rng.choice([0, len(data) - near])
    return _flip(data, rng, [first + rng.randrange(near) for _ in range(rng.choice([1, 1, 2, 4]))])


def flipped_at_records(data: bytes, rng: random.Random) -> bytes:
    """One bit within a record of a zip archive: a local header, an entry of the directory, its end."""
    marks = [i for i in range(len(data) - 4) if data[i : i + 2] == b"PK" and data[i + 2] < 9]
    if not marks:
        return flipped_in_headers(data, rng)
    return _flip(data, rng, [min(len(data) - 1, rng.choice(marks) + rng.randrange(64))])


def zeroed(data: bytes, rng: random.Random) -> bytes:
    """A block of zeros, as of a disk that never wrote it."""
    first, size = _block(data, rng)
    return data[:first] + bytes(len(data[first : first + size])) + data[first + size :]


def swapped(data: bytes, rng: random.Random) -> bytes:
    """Two blocks in each other's place."""
    _, size = _block(data, rng)
    size = min(size, len(data) // 2)
    one, two = sorted(rng.randrange(len(data) - size + 1) for _ in range(2))
    two = max(two, min(one + size, len(data) - size))
    a, b = data[one : one + size], data[two : two + size]
    return data[:one] + b + data[one + size : two] + a + data[two + size :]


def doubled(data: bytes, rng: random.Random) -> bytes:
    """A block twice, so that what follows is moved."""
    first, size = _block(data, rng)
    return data[: first + size] + data[first:]


def empty(data: bytes, rng: random.Random) -> bytes:
    """Nothing, or as many zeros."""
    return rng.choice([b"", bytes(len(data))])


def noise(data: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    return rng.choice(
        [rng.randbytes(rng.randint(1, 4096)), b"<!DOCTYPE html><html>404</html>", b"PK\x03\x04" + bytes(40)]
    )


DAMAGES = (
    truncated, flipped, flipped_in_headers, flipped_at_records, zeroed, swapped, doubled, empty, noise,
)  # fmt: skip


def _flip(data: bytes, rng: random.Random, places: list[int]) -> bytes:
    found = bytearray(data)
    for place in places:
        found[place] ^= 1 << rng.randrange(8)
    return bytes(found)


def _block(data: bytes, rng: random.Random) -> tuple[int, int]:
    size = rng.choice([16, 512, 4096])
    return rng.randrange(max(1, len(data) - size)), size


class Runs:
    """Pickles as a call of `function`, which is what the attacks of this kind come to."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(checkpoint: Path, marker: Path) -> dict[str, bytes]:
    """Files that write `marker` if anything in them is run, made of a good checkpoint, by their names."""
    import os

    import torch

    attacks = {
        "os.system": Runs(os.system, f"touch {marker}"),
        "exec": Runs(exec, f"open({str(marker)!r}, 'w')"),
        "open": Runs(open, str(marker), "w"),
        "getattr": Runs(getattr, Runs(__import__, "os"), "environ"),
    }
    good, found = torch.load(checkpoint, weights_only=True), {}
    for name, attack in attacks.items():
        for where, content in (
            ("alone", attack),
            ("in config", {**good, "config": attack}),
            ("beside", {**good, "x": attack}),
        ):
            found[f"{name}, {where}, saved by torch"] = _saved(content)
            found[f"{name}, {where}, old torch"] = _saved(content, _use_new_zipfile_serialization=False)
        found[f"{name}, a bare pickle"] = pickle.dumps(attack)
        found[f"{name}, data.pkl changed"] = _changed(checkpoint, {"data.pkl": pickle.dumps(attack, protocol=2)})
        found[f"{name}, pickle.loads in data.pkl"] = _changed(
            checkpoint, {"data.pkl": pickle.dumps(Runs(pickle.loads, pickle.dumps(attack)), protocol=2)}
        )
    code = {
        "code/__torch__.py": f"open({str(marker)!r}, 'w')".encode(),
        "constants.pkl": pickle.dumps(attacks["open"], protocol=2),
    }
    found["TorchScript's code/ and constants.pkl"] = _changed(checkpoint, code)
    found["a code/ entry alone"] = _changed(checkpoint, {"code/__torch__.py": code["code/__torch__.py"]})
    return found


def _saved(content: object, **how) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def _changed(checkpoint: Path, entries: dict[str, bytes]) -> bytes:
    """The archive with entries added or replaced, its checksums right."""
    made = io.BytesIO()
    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(made, "w") as new:
        top = old.namelist()[0].partition("/")[0]
        for info in old.infolist():
            if info.filename.partition("/")[2] not in entries:
                new.writestr(info.filename, old.read(info))
        for name, data in entries.items():
            new.writestr(f"{top}/{name}", data)
    return made.getvalue()
