"""Things named as images that are none, or that would take more memory than there is."""

import io
import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.data import decode
from fcmae.data.decode import BrokenImage, read_image
from fcmae.data.sources import open_source
from fcmae.data.transforms import MAX_ASPECT, Surrounding


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "link to itself"])
def test_what_is_no_file_is_named_at_once(tmp_path, kind):
    path = tmp_path / "x.jpg"
    if kind == "pipe":
        os.mkfifo(path)  # that nobody writes into: opening it would wait for ever
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")  # endless
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(BrokenImage) as caught:
        read_image(str(path), 3)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_larger_than_memory_is_not_read(tmp_path):
    path = tmp_path / "x.jpg"
    with open(path, "wb") as file:
        file.truncate(decode.MAX_BYTES + 1)  # takes no room on the disk
    with pytest.raises(BrokenImage, match="1.0 GiB are more than an image may have, 1"):
        read_image(str(path), 3)


def test_postscript_is_not_given_to_ghostscript(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    (tmp_path / "x.jpg").write_bytes(buffer.getvalue())
    with pytest.raises(BrokenImage, match="not an image that can be read"):
        read_image(str(tmp_path / "x.jpg"), 3)


def test_a_small_array_or_tiff_of_very_many_pixels(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, array in (("x.tif", np.zeros((40, 40, 4), np.uint8)), ("x.npy", np.zeros((40, 40, 4), np.float32))):
        path = tmp_path / name
        tifffile.imwrite(path, array, compression="zlib") if name == "x.tif" else np.save(path, array)
        with pytest.raises(BrokenImage, match="pixels"):
            read_image(str(path), 4)


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), "red").save(tmp_path / "x.jpg", exif=exif)
    assert read_image(str(tmp_path / "x.jpg"), 3).shape == (3, 8, 4)
    data = (tmp_path / "x.jpg").read_bytes()
    at = data.index(b"Exif\0\0") + 6
    (tmp_path / "x.jpg").write_bytes(data[:at] + b"ZZ" + data[at + 2 :])
    assert read_image(str(tmp_path / "x.jpg"), 3).shape == (3, 4, 8)


def test_names_of_any_bytes_make_one_line(tmp_path):
    for name in (b"a\nb.jpg", b"\xff.jpg"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    source = open_source(str(tmp_path), 3)
    for i, shown in ((0, r"a\nb.jpg"), (1, r"\udcff.jpg")):
        with pytest.raises(BrokenImage) as caught:
            source.load(i)
        assert str(caught.value) == f"{tmp_path}/{shown}: the file is empty"
        str(caught.value).encode()


def test_a_line_of_pixels_is_not_scaled_to_gigabytes():
    line = torch.arange(30_000, dtype=torch.uint8)[None, None].repeat(3, 1, 1)
    scaled = Surrounding((32, 32))(line)
    assert scaled.shape[-2] < 40 and scaled.shape[-1] < 40 * MAX_ASPECT
    square = torch.randint(256, (3, 50, 80), dtype=torch.uint8)
    assert Surrounding((32, 32))(square).shape == (3, 36, 58)
