"""The bytes of one image file -> one tensor (C, H, W) with the channels that the model wants.

Photographs are read by Pillow, arrays (`.npy`, multi-channel TIFF) by numpy and tifffile.
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fcmae.errors import one_line

PHOTO_CHANNELS = (1, 3, 4)
ARRAY_EXTENSIONS = (".npy", ".tif", ".tiff")
PHOTO_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# What Pillow may take a file for, whatever its name. Of its others EPS would have Ghostscript run what is in the file.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "AVIF", "JPEG2000", "PPM", "TIFF")
MAX_BYTES = 2**30  # of a file; Pillow's own limit is on pixels, 89 million


class BrokenImage(Exception):
    """An image that cannot be read: `path` names it, `reason` is one line. The dataset replaces it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return one_line(f"{self.path}: {self.reason}")


def extensions(in_chans: int) -> tuple[str, ...]:
    """The lower-case file extensions that can hold images of `in_chans` channels."""
    return PHOTO_EXTENSIONS + ARRAY_EXTENSIONS if in_chans in PHOTO_CHANNELS else ARRAY_EXTENSIONS


def read_image(path: str, in_chans: int) -> Tensor:
    """`decode` of the file at `path`; a file that cannot be opened is a BrokenImage too."""
    try:
        with open(path, "rb", opener=_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BrokenImage(path, "a pipe or a device, no file")
            check_bytes(status.st_size, path)
            data = file.read()
    except OSError as error:
        raise BrokenImage(path, error.strerror or str(error)) from error
    return decode(data, in_chans, path)


def check_bytes(size: int, name: str) -> None:
    """Raises BrokenImage for more bytes than an image may have, before they are read into memory."""
    if size > MAX_BYTES:
        raise BrokenImage(name, f"{size / 2**30:.1f} GiB are more than an image may have, {MAX_BYTES / 2**30:g}")


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def decode(data: bytes, in_chans: int, name: str) -> Tensor:
    """One image as (in_chans, H, W): uint8 for 8-bit photographs, else float32 (integers scaled to [0, 1]).

    What the file is follows from its first bytes, not from its name. Grey photographs are replicated for 3
    channels, coloured ones become luma for 1, transparency is laid on white for 1 and 3 and kept for 4.
    Arrays must have `in_chans` channels, on the last or the first axis (last, when both fit). Raises
    BrokenImage.
    """
    try:
        # A file's oddities must not flood the terminal of a long run, but a decompression bomb is an error.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(data, in_chans)
    except UnidentifiedImageError as error:
        raise BrokenImage(name, "not an image that can be read" if data else "the file is empty") from error
    except Exception as error:  # decoders raise nearly every type on damaged files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BrokenImage(name, lines[0]) from error


def _decode(data: bytes, in_chans: int) -> Tensor:
    if data.startswith(b"\x93NUMPY"):
        return _array(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False), in_chans)
    if not data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return _photo(data, in_chans)
    # Pillow drops further pages and the fourth band of RGB + near infrared: it reads only what it can whole.
    if in_chans in (1, 3) and _is_plain(data):
        return _photo(data, in_chans)
    try:
        return _array(_tiff(data, in_chans), in_chans)
    except Exception:
        if in_chans != 4:
            raise
        return _photo(data, in_chans)


def _is_plain(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=["TIFF"]) as file:
            return getattr(file, "n_frames", 1) == 1
    except UnidentifiedImageError:
        return False


def _tiff(data: bytes, in_chans: int) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError('multi-channel TIFF needs tifffile: pip install "fcmae[tiff]"') from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        _check_values(file.series[0].shape, in_chans)  # before a small file of many equal pixels is unpacked
        return file.series[0].asarray()


def _check_values(shape: tuple[int, ...], in_chans: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and math.prod(shape) > limit * in_chans:
        raise ValueError(f"an array of shape {tuple(shape)} has more than {limit} pixels")


def _photo(data: bytes, in_chans: int) -> Tensor:
    with Image.open(io.BytesIO(data), formats=_formats()) as file:
        if in_chans not in PHOTO_CHANNELS:
            bands = len(file.getbands())
            raise ValueError(f"the file's channels ({bands}) do not match in_chans={in_chans}")
        image = _upright(file)
    if image.mode[0] in "IF":
        return _deep_grey(image, in_chans)
    if in_chans == 4:
        image = image.convert("RGBA")
    else:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if in_chans == 1 else "RGB")
    pixels = np.array(image)
    # Rows of (H, W, C) stay as they are in memory: torchvision resizes channels-last uint8 fastest.
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], in_chans)).permute(2, 0, 1)


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _upright(file: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data says; as it is where those are damaged."""
    file.load()  # whose errors are the picture's
    try:
        return ImageOps.exif_transpose(file)
    except Exception:
        return file.copy()


def _deep_grey(image: Image.Image, in_chans: int) -> Tensor:
    """Grey of 16 bits (modes I;16 and I) scaled by its full range, or of 32-bit floats (mode F) as it is."""
    pixels = np.array(image)
    if image.mode != "F":
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError("integers beyond 16 unsigned bits have no known range; save as float32")
        pixels = pixels.astype(np.float32) / 0xFFFF
    grey = torch.from_numpy(_finite(pixels.astype(np.float32)))[None]
    if in_chans == 4:
        return torch.cat([grey, grey, grey, torch.ones_like(grey)])
    return grey.repeat(in_chans, 1, 1)


def _array(array: np.ndarray, in_chans: int) -> Tensor:
    shape = array.shape
    _check_values(shape, in_chans)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size:
        raise ValueError(f"an array of shape {shape} is not an image (H, W, C) or (C, H, W)")
    if array.shape[-1] == in_chans:
        array = array.transpose(2, 0, 1)
    elif array.shape[0] != in_chans:
        found = min(array.shape[0], array.shape[-1])
        raise ValueError(f"the file's channels ({found}, shape {shape}) do not match in_chans={in_chans}")
    if array.dtype in (np.uint8, np.uint16):
        array = array.astype(np.float32) / np.iinfo(array.dtype).max
    elif array.dtype.kind != "f":
        raise ValueError(f"values of type {array.dtype} have no known range; save uint8, uint16 or float32")
    return torch.from_numpy(_finite(np.ascontiguousarray(array, dtype=np.float32)))


def _finite(pixels: np.ndarray) -> np.ndarray:
    if not np.isfinite(pixels).all():
        raise ValueError("has NaN or infinite values")
    return pixels
