"""Where the visible tiles of a batch lie: the whole index of the sparse path, no hash table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE_SIZES = (8, 4, 2, 1)  # pixels along a region at stages 1-4
STORAGE = (torch.float32, torch.bfloat16, torch.float16)  # what the native kernels read and write


class Tiles(NamedTuple):
    """The visible regions of a batch of masks; K is the same for every image, so every shape is static.

    mask: (B, gh, gw) bool, True = masked.
    keep: (B, K) int64, row-major region numbers of the visible regions, ascending.
    slot: (B, gh, gw) int64, the place in `keep` of a visible region, -1 where masked.
    """

    mask: Tensor
    keep: Tensor
    slot: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, keep_count: int) -> Tiles:
        """The tables of a mask (B, gh, gw) whose images each keep `keep_count` regions (not checked here)."""
        flat = mask.flatten(1)
        keep = flat.to(torch.uint8).argsort(dim=1, stable=True)[:, :keep_count].contiguous()
        slot = (~flat).cumsum(1) - 1
        return cls(mask, keep, slot.masked_fill(flat, -1).view(mask.shape))

    @property
    def grid(self) -> tuple[int, int]:
        """Regions down and across, (gh, gw)."""
        return self.mask.shape[1], self.mask.shape[2]

    def to(self, device: torch.device, non_blocking: bool = False) -> Tiles:
        """The same tables on another device."""
        return Tiles(*(t.to(device, non_blocking=non_blocking) for t in self))


def takes_tiles(x: Tensor, kernel_size: int) -> bool:
    """Whether tiles (B, K, t, t, C) and a kernel are of the dtypes and sizes that native convolutions are made for."""
    square = x.shape[2] == x.shape[3]
    return x.dtype in STORAGE and kernel_size == 7 and square and x.shape[2] in TILE_SIZES and x.numel() > 0


def pack(x: Tensor, tiles: Tiles) -> Tensor:
    """The visible tiles (B, K, t, s, C) of a map (B, gh*t, gw*s, C)."""
    (b, height, width, c), (gh, gw) = x.shape, tiles.grid
    regions = x.view(b, gh, height // gh, gw, width // gw, c).transpose(2, 3)  # (B, gh, gw, t, s, C)
    batch = torch.arange(b, device=x.device)[:, None]
    return regions[batch, tiles.keep // gw, tiles.keep % gw]


def unpack(x: Tensor, tiles: Tiles) -> Tensor:
    """The map (B, gh*t, gw*s, C) of packed tiles (B, K, t, s, C), zero where masked."""
    (b, _, t, s, c), (gh, gw) = x.shape, tiles.grid
    regions = x.new_zeros(b, gh * gw, t, s, c)
    index = tiles.keep[:, :, None, None, None].expand_as(x)
    regions = regions.scatter(1, index, x)  # distinct indices: deterministic
    return regions.view(b, gh, gw, t, s, c).transpose(2, 3).reshape(b, gh * t, gw * s, c)
