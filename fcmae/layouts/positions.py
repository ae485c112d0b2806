"""A ViT's positions: fixed or trained, the grid they are of, and the same for another grid."""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.models.vit import positions


def fixed_grid(pos_embed: Tensor) -> tuple[int, int] | None:
    """Rows and columns of positions (1, 1 + rows*columns, D) that are MAE's fixed ones; None for trained ones."""
    count, dim = pos_embed.shape[1] - 1, pos_embed.shape[2]
    if pos_embed.is_meta or dim % 4:
        return None
    rounding = 1e-5 if pos_embed.dtype in (torch.float32, torch.float64) else 1e-2  # of how they were stored
    for rows in (n for n in range(1, count + 1) if count % n == 0):
        grid = rows, count // rows
        if (positions(grid, dim) - pos_embed.float().cpu()).abs().max() < rounding:
            return grid
    return None


def resampled(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions (1, 1 + rows*columns, D) of the grid `old` for the grid `new`, by timm's bicubic resampling."""
    from timm.layers import resample_abs_pos_embed  # seconds to import

    return resample_abs_pos_embed(pos_embed, new_size=list(new), old_size=list(old), num_prefix_tokens=1).contiguous()


def grid_of(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of (H, W) pixels."""
    return size[0] // patch_size, size[1] // patch_size


def squarest(count: int) -> tuple[int, int]:
    """The most square grid of so many patches, lying rather than standing."""
    rows = max(n for n in range(1, int(count**0.5) + 1) if count % n == 0)
    return rows, count // rows
