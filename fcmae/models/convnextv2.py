"""ConvNeXt V2 encoder: dense and sparse share these parameters, which carry timm's names (arXiv 2301.00808)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.models.layers import Block, PatchConv
from fcmae.models.norms import check_norm
from fcmae.models.support import Support

STRIDE = 32  # pixels of one region: stem 4, then three downsamplings by 2


class Stage(nn.Module):
    """One resolution: an optional LayerNorm + 2x2 downsampling, then blocks."""

    def __init__(self, dim_in: int, dim: int, depth: int, downsample: bool, grn: str, norm: str):
        super().__init__()
        self.downsample = (
            nn.Sequential(nn.LayerNorm(dim_in, eps=1e-6), PatchConv(dim_in, dim, 2)) if downsample else nn.Identity()
        )
        self.blocks = nn.ModuleList(Block(dim, grn, norm) for _ in range(depth))

    def forward(self, x: Tensor, support: Support) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x, support)
        return x


class ConvNeXtV2(nn.Module):
    """The encoder without its final norm and head, as FCMAE pretrains it.

    in_chans: image channels. depths, dims: blocks and widths of the four stages. grn: `per_image` or `batch`. norm: in
    the blocks, one of `norms.NORMS`.
    """

    def __init__(
        self, in_chans: int, depths: Sequence[int], dims: Sequence[int], grn: str = "per_image", norm: str = "grn"
    ):
        super().__init__()
        if len(depths) != 4 or len(dims) != 4 or min(*depths, *dims, in_chans) < 1:
            raise UsageError(
                f"depths and dims must be four positive numbers each and in_chans positive; "
                f"got depths={list(depths)}, dims={list(dims)}, in_chans={in_chans}"
            )
        check_norm(norm, grn)
        self.in_chans, self.depths, self.dims, self.norm = in_chans, tuple(depths), tuple(dims), norm
        self.stem = nn.Sequential(PatchConv(in_chans, dims[0], 4), nn.LayerNorm(dims[0], eps=1e-6))
        self.stages = nn.ModuleList(
            Stage(dims[max(i - 1, 0)], dims[i], depths[i], downsample=i > 0, grn=grn, norm=norm) for i in range(4)
        )

    def forward(self, images: Tensor, support: Support) -> Tensor:
        """Images (B, in_chans, H, W) to features (B, H/32, W/32, dims[3]), zeros where nothing is visible."""
        x = self.stem(support.image(images))
        for stage in self.stages:
            x = stage(x, support)
        return support.to_map(x)

    def maps(self, images: Tensor, support: Support) -> list[Tensor]:
        """The same of every stage: (B, H/s, W/s, C) for s = 4, 8, 16, 32, zeros where nothing is visible."""
        x, maps = self.stem(support.image(images)), []
        for stage in self.stages:
            x = stage(x, support)
            maps.append(support.to_map(x))
        return maps
