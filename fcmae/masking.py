"""Masks over the grid of an image's regions: True = masked (hidden from the encoder).

Every image keeps exactly `keep_count(L, mask_ratio)` of its L regions whatever the strategy, so that packed features
have a static shape (FCMAE, arXiv 2301.00808 §3; MAE, arXiv 2111.06377 §3).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fcmae.errors import UsageError, nearest


def keep_count(regions: int, mask_ratio: float) -> int:
    """How many of `regions` stay visible: int(L * (1 - r)), in the same floating-point order as both papers' code.

    Raises UsageError when nothing would be visible or nothing masked.
    """
    if not 0.0 < mask_ratio < 1.0:
        raise UsageError(f"mask_ratio={mask_ratio} must lie between 0 and 1, both excluded")
    keep = int(regions * (1 - mask_ratio))
    if keep == 0 or keep == regions:
        what = "keeps" if keep == 0 else "masks"
        raise UsageError(
            f"mask_ratio={mask_ratio} {what} none of the {regions} regions of an image; "
            f"{'lower' if keep == 0 else 'raise'} the ratio or enlarge the image"
        )
    return keep


def grid_size(image_size: tuple[int, int], unit: int) -> tuple[int, int]:
    """Regions (gh, gw) of an image of (H, W) pixels. Raises UsageError naming the nearest two sizes that fit."""
    for name, size in zip(("height", "width"), image_size, strict=True):
        if size < unit or size % unit:
            below, above = max(0, size // unit * unit), max(1, size // unit + 1) * unit
            near = f"the nearest are {below} and {above}" if below else f"the smallest is {above}"
            raise UsageError(f"image {name} {size} is not a multiple of the mask unit {unit}; {near}")
    return image_size[0] // unit, image_size[1] // unit


def random_mask(rng: np.random.Generator, grid: tuple[int, int], keep: int) -> np.ndarray:
    """Regions hidden uniformly at random without replacement, the default of both papers."""
    mask = np.ones(grid[0] * grid[1], dtype=bool)
    mask[rng.permutation(mask.size)[:keep]] = False
    return mask.reshape(grid)


def block_mask(rng: np.random.Generator, grid: tuple[int, int], keep: int) -> np.ndarray:
    """Rectangles are hidden one after another until the count is reached (the block-wise sampling of BEiT, compared
    in MAE figure 6); the last rectangle is cut short so that the count is exact."""
    gh, gw = grid
    target = gh * gw - keep
    mask = np.zeros(grid, dtype=bool)
    smallest = min(4, target)
    while (missing := target - int(mask.sum())) > 0:
        area = rng.uniform(min(smallest, missing), max(smallest, missing))
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h = min(gh, max(1, round(math.sqrt(area * aspect))))
        w = min(gw, max(1, round(math.sqrt(area / aspect))))
        top, left = rng.integers(gh - h + 1), rng.integers(gw - w + 1)
        window = mask[top : top + h, left : left + w]
        fresh = np.argwhere(~window)[:missing]
        window[fresh[:, 0], fresh[:, 1]] = True
    return mask


def grid_mask(rng: np.random.Generator, grid: tuple[int, int], keep: int) -> np.ndarray:
    """Visible regions spread evenly (the grid-wise sampling of MAE figure 6): one of every 2 x 2 at a ratio of 0.75,
    a checkerboard at 0.5; between them as many of the next cell of each 2 x 2 as are still needed, at random."""
    cells = np.array([[0, 2], [3, 1]])[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
    gh, gw = grid
    rank = cells[np.ix_(np.arange(gh) % 2, np.arange(gw) % 2)].ravel()
    mask = np.ones(gh * gw, dtype=bool)
    mask[np.lexsort((rng.random(gh * gw), rank))[:keep]] = False
    return mask.reshape(grid)


STRATEGIES: dict[str, Callable[[np.random.Generator, tuple[int, int], int], np.ndarray]] = {
    "random": random_mask,
    "block": block_mask,
    "grid": grid_mask,
}


def draw_mask(rng: np.random.Generator, grid: tuple[int, int], mask_ratio: float, strategy: str) -> np.ndarray:
    """One image's mask, (gh, gw) bool, True = masked. Raises UsageError for an unknown strategy or a bad ratio."""
    if strategy not in STRATEGIES:
        raise UsageError(
            f"unknown mask strategy {strategy!r}; known: {', '.join(STRATEGIES)}{nearest(strategy, STRATEGIES)}"
        )
    return STRATEGIES[strategy](rng, grid, keep_count(grid[0] * grid[1], mask_ratio))


def mask_from_noise(noise: Tensor, keep: int) -> Tensor:
    """Mask (B, gh, gw) bool that keeps the `keep` smallest of each image's noise (B, gh, gw), as both papers' code."""
    flat = noise.flatten(1)
    mask = torch.ones_like(flat, dtype=torch.bool)
    return mask.scatter(1, flat.argsort(dim=1, stable=True)[:, :keep], False).view_as(noise)


def check_mask(mask: Tensor, batch: int, grid: tuple[int, int]) -> int:
    """The visible count K that all images of a given mask (B, gh, gw) share; one host synchronisation on a GPU.

    Raises UsageError for a wrong shape or type, or when images keep different counts, nothing or everything is kept.
    """
    if mask.dtype != torch.bool or tuple(mask.shape) != (batch, *grid):
        raise UsageError(
            f"mask must be bool of shape {(batch, *grid)}, True = masked; got {mask.dtype} {tuple(mask.shape)}"
        )
    counts = (~mask).flatten(1).sum(1).unique().tolist()
    if len(counts) != 1:
        raise UsageError(f"every image must keep the same number of regions; this mask keeps {counts}")
    if counts[0] == 0:
        raise UsageError("the mask keeps none of the regions; at least one must stay visible")
    return counts[0]
