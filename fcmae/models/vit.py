"""What a ViT is made of here: MAE's encoder and decoder, and FCMAE's decoder of ViT blocks."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed positions (1, 1 + gh*gw, dim) of the class token, zeros, and of the patches, row-major.

    The first half of a vector tells the column, the second the row, each as the sines and then the cosines of
    dim/4 frequencies from 1 down to almost 1/10000 (arXiv 2111.06377 appendix A.1, in the authors' order).
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid)  # (n, dim/4)
    rows, columns = (torch.cat([x.sin(), x.cos()], 1) for x in (rows, columns))  # (n, dim/2)
    gh, gw = grid
    patches = torch.cat([columns.repeat(gh, 1), rows.repeat_interleave(gw, 0)], 1)
    return torch.cat([patches.new_zeros(1, dim), patches])[None].float()


def vit_blocks(dim: int, depth: int, heads: int) -> nn.ModuleList:
    """timm's ViT blocks, their norms with the authors' eps."""
    from timm.models.vision_transformer import Block  # seconds to import, which a ConvNet need not wait for

    return nn.ModuleList(Block(dim, heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))


def check_sizes(**sizes: int) -> None:
    """Raises UsageError naming the first size that is not positive."""
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name}={value} must be 1 or more")


def check_width(dim: int, heads: int, prefix: str) -> None:
    """Raises UsageError for a width that has no such positions or heads; prefix: of the settings' names."""
    check_sizes(**{f"{prefix}dim": dim, f"{prefix}heads": heads})
    if dim % 4:
        raise UsageError(f"{prefix}dim={dim} must be a multiple of 4, for sines and cosines of rows and columns")
    if dim % heads:
        raise UsageError(f"{prefix}dim={dim} must be a multiple of {prefix}heads={heads}")
