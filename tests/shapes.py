"""Small labelled pictures: drawn shapes, one kind a class, of any colour, place and size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("bars", "disc", "frame", "wedge")


def draw(kind: str, rng: np.random.Generator, side: int = 40) -> Image.Image:
    """One picture of a class of CLASSES."""
    back, front = (tuple(int(v) for v in rng.integers(*span, 3)) for span in ((0, 100), (150, 255)))
    image = Image.new("RGB", (side, side + int(rng.integers(0, 9))), back)
    pen, (left, top) = ImageDraw.Draw(image), rng.integers(0, side // 3, 2).tolist()
    right, bottom = left + side // 2, top + side // 2
    if kind == "bars":
        for x in range(left, right, 6):
            pen.rectangle((x, top, x + 2, bottom), fill=front)
    elif kind == "disc":
        pen.ellipse((left, top, right, bottom), fill=front)
    elif kind == "frame":
        pen.rectangle((left, top, right, bottom), outline=front, width=3)
    else:
        pen.polygon(((left, bottom), (right, bottom), (left, top)), fill=front)
    return image


def make_shapes(folder: Path, train: int = 12, val: int = 5) -> Path:
    """train/CLASS/*.png and val/CLASS/*.png; the classes have `train` images, the last one two less."""
    for part, count in (("train", train), ("val", val)):
        for label, kind in enumerate(CLASSES):
            (folder / part / kind).mkdir(parents=True)
            for i in range(count - 2 * (label == 3)):
                rng = np.random.default_rng([part == "val", label, i])
                draw(kind, rng).save(folder / part / kind / f"{i:03d}.png")
    return folder
