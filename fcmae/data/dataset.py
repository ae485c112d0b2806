"""Images and masks whose randomness is a function of (seed, epoch, index) and of nothing else."""

from __future__ import annotations

from collections.abc import Callable

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


class MaskedImages(Dataset):
    """A map-style dataset with keys (epoch, index), 0 <= index < len(source).

    An item is {"image": float32 (C, H, W), "mask": bool (gh, gw), "index": int, "bad": list[str]}; in a mask
    True = masked. `transform` maps a decoded image to the item's and may use torch's CPU generator;
    `draw(rng)` draws the mask.

    An image that cannot be read is replaced by another, the same one every time, under the crop and mask of
    the original; "bad" then holds one line "name: reason" for each that failed. After 32 failures in a row
    the item raises UsageError.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Tensor], Tensor],
        seed: int,
        draw: Callable[[np.random.Generator], np.ndarray],
    ):
        if seed < 0:
            raise UsageError(f"seed={seed} must not be negative")
        self.source, self.transform, self.seed, self.draw = source, transform, seed, draw

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        # Separate streams: a transform that draws more or fewer numbers must not change the mask.
        crop, mask, spare = np.random.SeedSequence([self.seed, epoch, index]).spawn(3)
        image, bad = self._load(index, np.random.default_rng(spare))
        return {
            "image": self._transform(image, crop),
            "mask": torch.from_numpy(self.draw(np.random.default_rng(mask))),
            "index": index,
            "bad": bad,
        }

    def _load(self, index: int, spare: np.random.Generator) -> tuple[Tensor, list[str]]:
        bad: list[str] = []
        for _ in range(MAX_TRIES):
            try:
                return self.source.load(index), bad
            except BrokenImage as error:
                bad.append(str(error))
                index = int(spare.integers(len(self.source)))
        raise UnreadableImages(f"{MAX_TRIES} images in a row were unreadable, the last: {bad[-1]}")

    def _transform(self, image: Tensor, seed: np.random.SeedSequence) -> Tensor:
        # torch.manual_seed would seed the GPUs too, and they belong to the model.
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(int(seed.generate_state(1, np.uint64)[0]))
        try:
            return self.transform(image).contiguous()
        finally:
            torch.set_rng_state(before)
