"""Real photographs for a first run, from scikit-image's wheel; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

from fcmae.data.decode import read_image
from fcmae.errors import UsageError

PHOTOS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png"),
    *("motorcycle_right.png", "retina.jpg", "rocket.jpg"),
)
LENGTH = 1024


class SamplePhotos:
    """1,024 entries over the photographs, entry i being photograph i mod n; random crops tell them apart.

    Raises UsageError when scikit-image is not installed.
    """

    def __init__(self, in_chans: int):
        spec = importlib.util.find_spec("skimage")
        folders = spec.submodule_search_locations if spec else None
        if not folders:
            raise UsageError('data.source=sample needs scikit-image: pip install "fcmae[sample]"')
        paths = [os.path.join(folders[0], "data", name) for name in PHOTOS]
        self.paths = [path for path in paths if os.path.isfile(path)]
        if not self.paths:
            raise UsageError("the installed scikit-image has no sample photographs; install another")
        self.in_chans = in_chans
        self.decoded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return LENGTH

    def load(self, i: int) -> Tensor:
        """Photograph i mod n, decoded once per process; callers must not write into it."""
        photo = i % len(self.paths)
        if photo not in self.decoded:
            self.decoded[photo] = read_image(self.paths[photo], self.in_chans)
        return self.decoded[photo]

    def name(self, i: int) -> str:
        return self.paths[i % len(self.paths)]
