"""One file, one tensor: known pixels through every mode, and one line for every file that cannot be read."""

import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageFile

from fcmae.data.decode import BrokenImage, decode, read_image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def tif(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def pixel(tensor, row=0, column=0):
    return tensor[:, row, column].tolist()


def test_rgb_keeps_its_pixels_rows_and_columns():
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    image = decode(encoded(Image.fromarray(pixels)), 3, "x")
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (Image.new("L", (2, 2), 77), [77, 77, 77]),
        (Image.new("1", (2, 2), 1), [255, 255, 255]),
        (Image.new("LA", (2, 2), (100, 0)), [255, 255, 255]),
        (Image.new("LA", (2, 2), (100, 255)), [100, 100, 100]),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 255)), [10, 20, 30]),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), [255, 255, 255]),
        (Image.new("RGBA", (2, 2), (0, 100, 200, 51)), [204, 224, 244]),  # 0.2 * colour + 0.8 * white
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value[0]),
)
def test_grey_and_transparent_modes_as_rgb(image, rgb):
    assert pixel(decode(encoded(image), 3, "x")) == rgb


def palette():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return image


def test_palette_with_and_without_transparency():
    plain = decode(encoded(palette()), 3, "x")
    assert pixel(plain) == [255, 0, 0] and pixel(plain, 0, 1) == [0, 0, 255]
    holed = encoded(palette(), transparency=1)
    image = decode(holed, 3, "x")
    assert pixel(image) == [255, 0, 0] and pixel(image, 0, 1) == [255, 255, 255]
    assert pixel(decode(holed, 4, "x"), 0, 1)[3] == 0
    assert pixel(decode(encoded(palette(), "GIF", transparency=0), 3, "x")) == [255, 255, 255]


def test_cmyk_is_converted():
    image = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), 3, "x")
    assert pixel(image) == [255, 0, 0]
    jpeg = decode(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100), 3, "x")
    assert np.abs(np.array(pixel(jpeg)) - [0, 255, 255]).max() <= 2


def test_one_and_four_channels():
    orange = Image.new("RGB", (2, 2), (255, 128, 0))
    assert pixel(decode(encoded(orange), 1, "x")) == [np.array(orange.convert("L"))[0, 0]]
    assert pixel(decode(encoded(orange), 4, "x")) == [255, 128, 0, 255]
    assert pixel(decode(encoded(Image.new("RGBA", (2, 2), (1, 2, 3, 4))), 4, "x")) == [1, 2, 3, 4]
    assert pixel(decode(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0))), 1, "x")) == [255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM"])
def test_16_bit_grey_uses_its_whole_range(kind):
    values = np.array([[0, 255, 256], [32768, 65534, 65535]], dtype=np.uint16)
    if kind == "PGM":
        data = b"P5 3 2 65535\n" + values.astype(">u2").tobytes()
    else:
        data = encoded(Image.fromarray(values), kind)
    expected = torch.from_numpy(values.astype(np.float32) / 65535)
    for in_chans in (1, 3):
        image = decode(data, in_chans, "x")
        assert image.dtype == torch.float32 and torch.equal(image, expected.expand(in_chans, 2, 3))
    assert torch.equal(decode(data, 4, "x")[3], torch.ones(2, 3))


def test_exif_orientation_is_applied():
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    image = decode(encoded(Image.fromarray(pixels), exif=exif.tobytes()), 3, "x")
    assert image.shape == (3, 6, 4)
    assert image.sum() == 3 * 255 and pixel(image, 0, 3) == [255, 255, 255]


@pytest.mark.parametrize("in_chans", [2, 5, 13])
@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("file", ["npy", "tif"])
def test_arrays_of_many_channels_in_both_layouts(in_chans, layout, file):
    chw = np.random.default_rng(0).integers(0, 65536, (in_chans, 6, 7), dtype=np.uint16)
    stored = chw if layout == "CHW" else np.ascontiguousarray(chw.transpose(1, 2, 0))
    if file == "npy":
        data = npy(stored)
    else:
        data = tif(stored, photometric="minisblack", planarconfig="contig" if layout == "HWC" else "separate")
    image = decode(data, in_chans, "x")
    assert torch.equal(image, torch.from_numpy(chw.astype(np.float32) / 65535))


def test_array_types_scaling_and_the_ambiguous_layout():
    eight = np.array([[[0, 51, 255]]], dtype=np.uint8)
    assert pixel(decode(npy(eight), 3, "x")) == pytest.approx([0, 0.2, 1])
    floats = np.array([[-2.5, 7.0]], dtype=np.float64)
    assert torch.equal(decode(npy(floats), 1, "x"), torch.tensor([[[-2.5, 7.0]]]))
    cube = np.arange(5**3, dtype=np.float32).reshape(5, 5, 5)
    assert torch.equal(decode(npy(cube), 5, "x"), torch.from_numpy(cube.transpose(2, 0, 1).copy()))
    assert torch.equal(decode(tif(np.full((4, 4), 0.25, np.float32)), 3, "x"), torch.full((3, 4, 4), 0.25))


def test_pages_of_a_tiff_are_channels():
    pages = np.random.default_rng(0).integers(0, 256, (3, 6, 7), dtype=np.uint8)
    first, *others = (Image.fromarray(page) for page in pages)
    data = encoded(first, "TIFF", save_all=True, append_images=others)
    assert torch.equal(decode(data, 3, "x"), torch.from_numpy(pages / np.float32(255)))


def test_four_band_tiff_keeps_the_band_that_pillow_drops():
    bands = np.random.default_rng(0).integers(0, 256, (6, 7, 4), dtype=np.uint8)
    image = decode(tif(bands, photometric="rgb", extrasamples=[0]), 4, "x")
    assert torch.equal(image, torch.from_numpy(bands.transpose(2, 0, 1) / np.float32(255)))
    rgb = encoded(Image.new("RGB", (2, 2), (9, 8, 7)), "TIFF")
    assert pixel(decode(rgb, 4, "x")) == [9, 8, 7, 255]


RGB = encoded(Image.new("RGB", (40, 40), "red"))
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("data", "in_chans", "reason"),
    [
        (b"", 3, "the file is empty"),
        (b"hello, world", 3, "not an image that can be read"),
        (encoded(Image.fromarray(NOISE), "JPEG")[:900], 3, "truncated"),
        (encoded(Image.fromarray(NOISE))[:900], 3, "truncated"),
        (RGB, 13, "channels (3) do not match in_chans=13"),
        (npy(np.zeros((8, 8, 5), np.uint8)), 3, "channels (5, shape (8, 8, 5)) do not match in_chans=3"),
        (npy(np.zeros((8, 8), np.uint8)), 3, "channels (1, shape (8, 8)) do not match in_chans=3"),
        (tif(np.zeros((8, 8, 13), np.uint8), photometric="minisblack"), 3, "channels (8, shape (8, 8, 13))"),
        (npy(np.zeros((13, 8, 8), np.int16)), 13, "int16"),
        (npy(np.zeros((2, 13, 8, 8), np.uint8)), 13, "not an image"),
        (npy(np.full((13, 8, 8), np.nan)), 13, "NaN"),
        (npy(np.array([{"a": 1}], dtype=object)), 3, "allow_pickle=False"),
        (npy(np.zeros((13, 64, 64), np.uint8))[:999], 13, ""),
        (tif(np.ones((64, 64, 13), np.uint16), photometric="minisblack")[:5000], 13, ""),
        (tif(np.full((4, 4), 70000, np.uint32)), 1, "16 unsigned bits"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(data, in_chans, reason):
    with pytest.raises(BrokenImage) as caught:
        decode(data, in_chans, "some/name")
    assert str(caught.value).startswith("some/name: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.reason


def test_decompression_bombs_are_broken_and_pillow_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 1,600 pixels: a warning; 10,000: an error
    for side in (40, 100):
        with pytest.raises(BrokenImage, match="decompression bomb"):
            decode(encoded(Image.new("L", (side, side))), 3, "x")
    assert Image.MAX_IMAGE_PIXELS == 1000 and ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_file_that_is_not_there_or_is_no_file(tmp_path):
    with pytest.raises(BrokenImage, match="No such file"):
        read_image(str(tmp_path / "gone.png"), 3)
    with pytest.raises(BrokenImage, match="directory"):
        read_image(str(tmp_path), 3)
