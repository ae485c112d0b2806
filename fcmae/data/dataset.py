"""Images and masks whose randomness is a function of (seed, epoch, index) and of nothing else."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.data.decode import BrokenImage
from fcmae.data.sources import Source
from fcmae.errors import UsageError

MAX_TRIES = 32


class UnreadableImages(UsageError):
    """Too many images in a row could not be read."""

    def __init__(self, message: str):
        # A worker process hands its errors over as text, the whole traceback with the message last.
        last = message.strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{type(self).__module__}.{type(self).__name__}: "))


class KeyedImages(Dataset, ABC):
    """A map-style dataset with keys (epoch, index), 0 <= index < len(source).

    An item is {"image": float32 (C, H, W), "index": int, "bad": list[str]} and what a subclass adds in `more`.
    `transform` maps a decoded image to the item's and may use the global generators of torch's CPU, numpy and Python.

    An image that cannot be read is replaced by another, the same one every time, under the crop of the original; "bad"
    then holds one line "name: reason" for each that failed. After 32 failures in a row the item raises UsageError.
    """

    def __init__(self, source: Source, transform: Callable[[Tensor], Tensor], seed: int):
        if seed < 0:
            raise UsageError(f"seed={seed} must not be negative")
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        # Separate streams: a transform that draws more or fewer numbers must not change the mask.
        crop, mask, spare = np.random.SeedSequence([self.seed, epoch, index]).spawn(3)
        image, loaded, bad = self._load(index, np.random.default_rng(spare))
        return {"image": self._transform(image, crop), **self.more(loaded, mask), "index": index, "bad": bad}

    def _transform(self, image: Tensor, seed: np.random.SeedSequence) -> Tensor:
        with _seeded(seed):
            return self.transform(image).contiguous()

    @abstractmethod
    def more(self, loaded: int, seed: np.random.SeedSequence) -> dict[str, Tensor | int]:
        """What an item has besides its image, the source's number `loaded`; seed: for randomness of its own."""

    def _load(self, index: int, spare: np.random.Generator) -> tuple[Tensor, int, list[str]]:
        bad: list[str] = []
        for _ in range(MAX_TRIES):
            try:
                return self.source.load(index), index, bad
            except BrokenImage as error:
                bad.append(str(error))
                index = int(spare.integers(len(self.source)))
        raise UnreadableImages(f"{MAX_TRIES} images in a row were unreadable, the last: {bad[-1]}")


class MaskedImages(KeyedImages):
    """Images with a "mask", bool (gh, gw), True = masked, which `draw(rng)` draws."""

    def __init__(
        self,
        source: Source,
        transform: Callable[[Tensor], Tensor],
        seed: int,
        draw: Callable[[np.random.Generator], np.ndarray],
    ):
        super().__init__(source, transform, seed)
        self.draw = draw

    def more(self, loaded: int, seed: np.random.SeedSequence) -> dict[str, Tensor]:
        return {"mask": torch.from_numpy(self.draw(np.random.default_rng(seed)))}


class LabelledImages(KeyedImages):
    """Images with a "label": of the image that was read, also where it replaces another."""

    def __init__(self, source: Source, labels: np.ndarray, transform: Callable[[Tensor], Tensor], seed: int):
        super().__init__(source, transform, seed)
        self.labels = labels

    def more(self, loaded: int, seed: np.random.SeedSequence) -> dict[str, int]:
        return {"label": int(self.labels[loaded])}


@contextmanager
def _seeded(seed: np.random.SeedSequence) -> Iterator[None]:
    """The global generators seeded for one sample, and then as they were."""
    # torch.manual_seed would seed the GPUs too, and they belong to the model.
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    number = int(seed.generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
