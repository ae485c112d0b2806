"""A folder of images that are broken, odd or neither, and which of them can be read, known by how they were made.

Where chance decides, as after a flipped bit, Pillow is asked in a process of its own: `judged`.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
JUDGE = """
import json, sys, warnings
from PIL import Image
warnings.simplefilter("ignore")
warnings.simplefilter("error", Image.DecompressionBombWarning)
def good(path):
    try:
        with Image.open(path, formats=["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]) as file:
            file.load()
            file.convert("RGB")
        return True
    except Exception:
        return False
paths = json.load(sys.stdin)
json.dump([good(path) for path in paths], sys.stdout)
"""


# What a command is begun with so that root may read no more than other users.
AS_OTHERS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
AS_OTHERS = AS_OTHERS if os.geteuid() == 0 and shutil.which("setpriv") else []


class Corpus:
    """Makes files in a folder: `good` and `bad` hold their paths, `unsure` those for Pillow to judge."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.count = folder, random.Random(seed), 0
        self.good: set[str] = set()
        self.bad: set[str] = set()
        self.unsure: set[str] = set()
        self.sockets: list[socket.socket] = []
        folder.mkdir(parents=True, exist_ok=True)

    def photo(self, size: tuple[int, int] = (96, 72), mode: str = "RGB") -> Image.Image:
        """Something with structure, unlike any before, of width and height `size`."""
        shade = np.random.default_rng(self.rng.getrandbits(32)).integers(0, 256, (9, 12, 3), np.uint8)
        return Image.fromarray(shade).resize(size, Image.Resampling.BICUBIC).convert(mode)

    def path(self, name: str) -> Path:
        """A path that is free, in one of a few folders."""
        self.count += 1
        folder = self.folder / f"part{self.count % 7}"
        folder.mkdir(exist_ok=True)
        return folder / f"{self.count:05d}-{name}"

    def add(self, found: set[str], name: str, data: bytes) -> Path:
        """A file of these bytes."""
        path = self.path(name)
        path.write_bytes(data)
        found.add(str(path))
        return path

    def fill(self, counts: dict[str, int]) -> Corpus:
        """So many files of every kind of KINDS, or of each."""
        for kind, make in KINDS.items():
            for _ in range(counts.get(kind, counts.get("", 0))):
                make(self)
        unsure = sorted(self.unsure)
        for path, readable in zip(unsure, judged(unsure), strict=True):
            (self.good if readable else self.bad).add(path)
        return self


def judged(paths: list[str]) -> list[bool]:
    """Whether Pillow reads each file whole, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", JUDGE], input=json.dumps(paths), capture_output=True, text=True)
    return json.loads(done.stdout)


def encoded(image: Image.Image, kind: str, **how) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    """A PNG with these numbers in its header, its checksums right, whatever its (compressed) pixels are."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@functools.cache
def black(width: int, height: int, depth: int = 1, channels: int = 1) -> bytes:
    """A whole PNG without any light: a small file, however many pixels."""
    packer, row = zlib.compressobj(1), bytes(1 + (width * depth * channels + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png(width, height, depth, {1: 0, 3: 2, 4: 6}[channels], pixels)


def whole(c: Corpus) -> None:
    name, kind = c.rng.choice(list(FORMATS.items()))
    c.add(c.good, f"whole.{name}", encoded(c.photo(), kind))


def truncated(c: Corpus) -> None:
    name, kind = c.rng.choice(list(FORMATS.items()))
    data = encoded(c.photo(), kind)
    c.add(c.unsure, f"truncated.{name}", data[: c.rng.randrange(1, len(data))])


def flipped(c: Corpus) -> None:
    name, kind = c.rng.choice(list(FORMATS.items()))
    data = bytearray(encoded(c.photo(), kind))
    for _ in range(c.rng.choice([1, 2, 8, 64])):
        data[c.rng.randrange(len(data))] ^= 1 << c.rng.randrange(8)
    c.add(c.unsure, f"flipped.{name}", bytes(data))


def flipped_exif(c: Corpus) -> None:
    data = bytearray(encoded(c.photo(), "JPEG", exif=_exif(c.rng.randint(1, 8))))
    first = data.index(b"Exif")
    for _ in range(c.rng.choice([1, 4])):
        data[first + 6 + c.rng.randrange(24)] ^= 1 << c.rng.randrange(8)
    c.add(c.unsure, "exif.jpg", bytes(data))


def nothing(c: Corpus) -> None:
    c.add(c.bad, c.rng.choice(["empty.jpg", "empty.PNG", "empty.webp", "empty.npy"]), b"")


def zeros(c: Corpus) -> None:
    c.add(c.bad, "zeros.jpg", bytes(c.rng.randrange(1, 4096)))


def text(c: Corpus) -> None:
    said = c.rng.choice(
        [b"a list of things", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", b"%PDF-1.4\n1 0 obj"]
    )
    c.add(c.bad, c.rng.choice(["text.png", "page.jpg", "page.webp"]), said)


def svg(c: Corpus) -> None:
    c.add(c.bad, "vector.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')


def postscript(c: Corpus) -> None:
    c.add(c.bad, "postscript.jpg", encoded(c.photo(), "EPS"))


def misnamed(c: Corpus) -> None:
    name, kind = c.rng.choice([("png.jpg", "PNG"), ("jpeg.png", "JPEG"), ("webp.gif", "WEBP"), ("gif.jpeg", "GIF")])
    c.add(c.good, name, encoded(c.photo(), kind))


def cmyk(c: Corpus) -> None:
    image = c.photo(mode="CMYK")
    data = encoded(image, "JPEG")
    if c.rng.random() < 0.5:  # Adobe's marker says that the four channels are YCCK
        adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([c.rng.choice([0, 2])])
        at = data.find(b"\xff\xeeF") if b"Adobe" not in data else data.index(b"Adobe") - 4
        data = data[:at] + adobe + data[at + 16 :] if b"Adobe" in data else data[:2] + adobe + data[2:]
    c.add(c.good, "cmyk.jpg", data)


def animated(c: Corpus) -> None:
    name, kind = c.rng.choice([("gif", "GIF"), ("webp", "WEBP"), ("png", "PNG")])
    frames = [c.photo() for _ in range(3)]
    c.add(c.good, f"animated.{name}", encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50))


def turned(c: Corpus) -> None:
    name, kind = c.rng.choice(list(FORMATS.items()))
    c.add(c.good, f"turned.{name}", encoded(c.photo(), kind, exif=_exif(c.rng.randint(0, 9))))


def tiny(c: Corpus) -> None:
    name, kind = c.rng.choice(list(FORMATS.items()))
    size = c.rng.choice([(1, 1), (1, 7), (7, 1), (2, 2), (1, 300)])
    c.add(c.good, f"tiny.{name}", encoded(c.photo(size), kind))


def modes(c: Corpus) -> None:
    """16 bits, palettes with transparency, grey with alpha, two colours."""
    grey = np.random.default_rng(c.rng.getrandbits(32))
    image, how = c.rng.choice([
        (Image.fromarray(grey.integers(0, 65536, (40, 50), np.uint16)), {}),
        (c.photo(mode="P"), {"transparency": 3}),
        (c.photo(mode="P"), {"transparency": bytes(range(256))}),
        (c.photo(mode="LA"), {}), (c.photo(mode="RGBA"), {}), (c.photo(mode="1"), {}),
        (c.photo(mode="L"), {"transparency": 9}),
    ])  # fmt: skip
    c.add(c.good, "mode.png", encoded(image, "PNG", **how))


def line(c: Corpus) -> None:
    c.add(c.good, "line.png", encoded(Image.new("RGB", c.rng.choice([(30_000, 1), (1, 30_000), (30_000, 3)])), "PNG"))


def claiming(c: Corpus) -> None:
    width, height = c.rng.choice([(2**31 - 1, 2**31 - 1), (60_000, 60_000), (100_000, 2000), (2**31 - 1, 1)])
    c.add(c.bad, "bomb-claimed.png", png(width, height, 8, 2, zlib.compress(bytes(64))))


def bomb(c: Corpus) -> None:
    """A whole file of half a megabyte that unpacks to 30,000 x 30,000 pixels."""
    c.add(c.bad, "bomb.png", black(30_000, 30_000))


def bomb_gif(c: Corpus) -> None:
    width, height = c.rng.choice([(65_535, 65_535), (30_000, 30_000)])
    data = encoded(c.photo(), "GIF")
    c.add(c.bad, "bomb.gif", data[:6] + struct.pack("<HH", width, height) + data[10:])


def huge(c: Corpus) -> None:
    """Gigabytes that take no room on the disk."""
    path = c.add(c.bad, "huge.jpg", b"\xff\xd8\xff")
    os.truncate(path, c.rng.choice([3 * 2**30, 40 * 2**30]))


def array(c: Corpus) -> None:
    values = np.random.default_rng(c.rng.getrandbits(32)).random((20, 30, 3), np.float32)
    kind = c.rng.choice(["whole", "nan", "inf", "pickle", "shape", "claims", "cut"])
    file = io.BytesIO()
    if kind in ("nan", "inf"):
        values[3, 4, 1] = float(kind)
    if kind == "pickle":
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        np.save(file, values[..., :2] if kind == "shape" else values)
    data = file.getvalue()
    if kind == "claims":
        data = data.replace(b"(20, 30, 3), ", b"(99999, 99999, 3), ").replace(b" " * 10, b"    ", 1)
    if kind == "cut":
        data = data[:-7]
    c.add(c.good if kind == "whole" else c.bad, f"array-{kind}.npy", data)


def folder(c: Corpus) -> None:
    """A folder named as an image, which is one to look into."""
    path = c.path("folder.jpg")
    path.mkdir()
    inside = path / "inside.png"
    inside.write_bytes(encoded(c.photo(), "PNG"))
    c.good.add(str(inside))


def dangling(c: Corpus) -> None:
    path = c.path("dangling.jpg")
    path.symlink_to(c.rng.choice(["nowhere.jpg", path.name, "/nowhere/at/all.png"]))
    c.bad.add(str(path))


def linked(c: Corpus) -> None:
    path = c.path("linked.jpg")
    path.symlink_to(c.add(c.good, "target.png", encoded(c.photo(), "PNG")))
    c.good.add(str(path))


def pipe(c: Corpus) -> None:
    """That nobody writes into. A file that may not be read would not do here: root reads it all the same."""
    path = c.path("pipe.jpg")
    os.mkfifo(path)
    c.bad.add(str(path))


def plug(c: Corpus) -> None:
    path = c.path("socket.jpg")
    c.sockets.append(socket.socket(socket.AF_UNIX))
    where = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 107 letters
    try:
        c.sockets[-1].bind(path.name)
    finally:
        os.chdir(where)
    c.bad.add(str(path))


def device(c: Corpus) -> None:
    """Endless."""
    path = c.path("device.jpg")
    path.symlink_to("/dev/zero")
    c.bad.add(str(path))


def unreadable(c: Corpus) -> None:
    c.add(c.bad if AS_OTHERS or os.geteuid() else c.good, "unreadable.png", encoded(c.photo(), "PNG")).chmod(0)


def strange_name(c: Corpus) -> None:
    name = c.rng.choice(["a b.png", "ünï.png", "new\nline.png", os.fsdecode(b"\xff\xfe.png"), "-rf.png", "tab\t.png"])
    if c.rng.random() < 0.5:
        c.add(c.good, name, encoded(c.photo(), "PNG"))
    else:
        c.add(c.bad, name, b"")


KINDS: dict[str, Callable[[Corpus], None]] = {
    f.__name__: f
    for f in (
        whole, truncated, flipped, flipped_exif, nothing, zeros, text, svg, postscript, misnamed, cmyk, animated,
        turned, tiny, modes, line, claiming, bomb, bomb_gif, huge, array, folder, dangling, linked, pipe, plug, device,
        unreadable, strange_name,
    )
}  # fmt: skip
BOMBS = ("claiming", "bomb", "bomb_gif", "huge", "device")


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif
