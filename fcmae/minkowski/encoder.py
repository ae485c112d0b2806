"""The ConvNeXt V2 encoder in MinkowskiEngine's modules, under the names of the authors' sparse encoder.

Coordinates are the visible positions of the mask at the stem's resolution, (image, row, column); the engine derives
those of the other stages. Each call of `forward` makes its own, so that nothing outlives a step.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from fcmae.kernels.reference import response
from fcmae.kernels.tiles import Tiles, pack
from fcmae.layouts import LAYOUTS
from fcmae.minkowski import engine
from fcmae.models.convnextv2 import ConvNeXtV2
from fcmae.models.layers import PatchConv

STEM, TILE = 4, 8  # pixels of a stem position along a side, stem positions along a region


class SparseLayerNorm(nn.Module):
    """LayerNorm of every point's features."""

    def __init__(self, dim: int):
        super().__init__()
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        return _with_features(x, self.ln(x.F))


class SparseGRN(nn.Module):
    """Global response normalization over the points of each image, or (`batch`) of the whole local batch.

    The formula and its source are those of `fcmae.models.layers.GRN`; statistics here are over points (N, C).
    """

    def __init__(self, dim: int, mode: str):
        super().__init__()
        self.mode = mode
        self.gamma = nn.Parameter(torch.zeros(1, dim))
        self.beta = nn.Parameter(torch.zeros(1, dim))

    def forward(self, x, batch: int):
        features = x.F  # (N, C)
        if self.mode == "batch":
            _, n, _ = response(features.square().sum(0, keepdim=True))  # (1, C)
        else:
            image = x.C[:, 0].long()
            _, n, _ = response(features.new_zeros(batch, features.shape[1]).index_add(0, image, features.square()))
            n = n[image]
        return _with_features(x, features + self.gamma * (features * n) + self.beta)


class SparseBlock(nn.Module):
    """ConvNeXt V2 block on a sparse tensor."""

    def __init__(self, dim: int, grn: str):
        super().__init__()
        me = engine.load()
        # The authors' fork has a depthwise kernel of its own (CUDA alone) with the same parameters.
        depthwise = getattr(me, "MinkowskiDepthwiseConvolution", me.MinkowskiChannelwiseConvolution)
        self.dwconv = depthwise(dim, kernel_size=7, bias=True, dimension=2)
        self.norm = SparseLayerNorm(dim)
        self.pwconv1 = me.MinkowskiLinear(dim, 4 * dim)
        self.act = me.MinkowskiGELU()
        self.grn = SparseGRN(4 * dim, grn)
        self.pwconv2 = me.MinkowskiLinear(4 * dim, dim)

    def forward(self, x, batch: int):
        y = self.norm(self.dwconv(x))
        return x + self.pwconv2(self.grn(self.act(self.pwconv1(y)), batch))


class MinkowskiConvNeXtV2(nn.Module):
    """`ConvNeXtV2` of the same sizes and values in MinkowskiEngine's modules; its state dict is in their layout.

    As in the authors' code the stem, which sees whole patches, is dense; it runs on the visible regions alone.
    Raises UsageError when MinkowskiEngine is not installed, for devices and dtypes that it lacks.
    """

    def __init__(self, dense: ConvNeXtV2):
        super().__init__()
        me = engine.load()
        dims, grn = dense.dims, dense.stages[0].blocks[0].mlp.grn.mode
        # The engine's modules draw values, replaced below, and use torch in a way that it warns of.
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            stem = nn.Sequential(PatchConv(dense.in_chans, dims[0], STEM), nn.LayerNorm(dims[0], eps=1e-6))
            self.downsample_layers = nn.ModuleList([stem])
            for i in range(3):
                conv = me.MinkowskiConvolution(dims[i], dims[i + 1], kernel_size=2, stride=2, bias=True, dimension=2)
                self.downsample_layers.append(nn.Sequential(SparseLayerNorm(dims[i]), conv))
            self.stages = nn.ModuleList(
                nn.ModuleList(SparseBlock(dim, grn) for _ in range(depth))
                for depth, dim in zip(dense.depths, dims, strict=True)
            )
        whole = LAYOUTS["minkowski"].from_fcmae({f"encoder.{key}": value for key, value in dense.state_dict().items()})
        self.load_state_dict({key.removeprefix("encoder."): value for key, value in whole.items()}, strict=True)

    def forward(self, images: Tensor, tiles: Tiles) -> Tensor:
        """Images (B, in_chans, H, W) to features (B, H/32, W/32, dims[3]), zeros where masked."""
        me = engine.load()
        engine.check_device(images.device)
        engine.check_dtype(_compute_dtype(images))
        features = self.downsample_layers[0](pack(images.permute(0, 2, 3, 1), tiles))  # (B, K, 8, 8, C)
        x = me.SparseTensor(features.flatten(0, 3), _coordinates(tiles))
        for downsample, blocks in zip([nn.Identity(), *self.downsample_layers[1:]], self.stages, strict=True):
            x = downsample(x)
            for block in blocks:
                x = block(x, images.shape[0])
        # The engine's own dense() makes the map smaller where a border row is wholly masked.
        image, row, column = x.C.long().unbind(1)
        out = x.F.new_zeros(*tiles.mask.shape, x.F.shape[1])
        return out.index_put((image, row // TILE, column // TILE), x.F)


def _coordinates(tiles: Tiles) -> Tensor:
    """(B*K*64, 3) int32, image, row and column of every visible stem position, in the order of packed tiles."""
    b, k = tiles.keep.shape
    within = torch.arange(TILE, device=tiles.keep.device)
    image = torch.arange(b, device=within.device)[:, None, None, None]
    row = (tiles.keep // tiles.grid[1] * TILE)[..., None, None] + within[:, None]
    column = (tiles.keep % tiles.grid[1] * TILE)[..., None, None] + within
    shape = (b, k, TILE, TILE)
    return torch.stack([part.expand(shape) for part in (image, row, column)], -1).flatten(0, 3).int()


def _compute_dtype(images: Tensor) -> torch.dtype:
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype


def _with_features(x, features: Tensor):
    return engine.load().SparseTensor(
        features, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager
    )
