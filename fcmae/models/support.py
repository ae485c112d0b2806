"""Where features exist: the three ways to run one ConvNeXt block over the same parameters.

A support says how a map is cut out of the images, how the one operation that looks across positions (the depthwise
convolution) is done, and which positions GRN and batch norm may count. Everything else in the encoder acts on each
position alone and never asks. Feature layouts are channels-last: `DenseSupport` and `MaskedSupport` (B, H, W, C),
`TileSupport` (B, K, t, t, C) with t = 8, 4, 2, 1 at stages 1-4.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor

from fcmae.errors import UsageError, nearest
from fcmae.kernels import ops
from fcmae.kernels.tiles import Tiles, pack, unpack


class DenseSupport:
    """Every position exists: the ordinary dense network. fused: whether blocks run as two ops or as PyTorch's own."""

    fused = False

    def image(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) as channels-last features of this support."""
        return images.permute(0, 2, 3, 1)

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Depthwise convolution with weight (C, 1, k, k), stride 1, 'same' zero padding."""
        weight = weight.flatten(1).view(weight.shape)  # gives its gradient plain strides, as DDP's buckets have them
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[-1])
        return y.permute(0, 2, 3, 1)

    def visible(self, x: Tensor) -> Tensor:
        """x, with zeros at the positions that do not exist."""
        return x

    def rows(self, x: Tensor) -> Tensor:
        """The positions that exist, one after another (positions, C)."""
        return x.flatten(0, -2)

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`, shaped as `like`; zeros at the positions that do not exist."""
        return rows.view(like.shape)

    def to_map(self, x: Tensor) -> Tensor:
        """Features of this support as a full map (B, H, W, C), zeros where nothing exists."""
        return x


class MaskedSupport(DenseSupport):
    """Dense convolution times mask: computes everything, keeps what is visible. No compute is saved."""

    def __init__(self, tiles: Tiles):
        self.tiles = tiles
        self.keep = ~tiles.mask[..., None]  # (B, gh, gw, 1)

    def visible(self, x: Tensor) -> Tensor:
        t, s = x.shape[1] // self.keep.shape[1], x.shape[2] // self.keep.shape[2]
        return x * self.keep.repeat_interleave(t, 1).repeat_interleave(s, 2)

    def image(self, images: Tensor) -> Tensor:
        return self.visible(super().image(images))

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return super().conv(self.visible(x), weight, bias)

    def rows(self, x: Tensor) -> Tensor:
        return pack(x, self.tiles).flatten(0, -2)

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        (b, k), (gh, gw) = self.tiles.keep.shape, self.tiles.grid
        return unpack(rows.view(b, k, like.shape[1] // gh, like.shape[2] // gw, -1), self.tiles)

    def to_map(self, x: Tensor) -> Tensor:
        return self.visible(x)


class TileSupport:
    """Only the visible tiles exist, packed one after another. native: the device's own kernels, where it has some."""

    def __init__(self, tiles: Tiles, native: bool):
        self.tiles, self.native = tiles, native
        self.fused = native

    def image(self, images: Tensor) -> Tensor:
        return pack(images.permute(0, 2, 3, 1), self.tiles)

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.tile_conv(x, weight, bias, *self.tiles, self.native)

    def visible(self, x: Tensor) -> Tensor:
        return x

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten(0, -2)

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.view(like.shape)

    def to_map(self, x: Tensor) -> Tensor:
        return unpack(x, self.tiles)


Support = DenseSupport | TileSupport

# How the encoder's own parameters may run on a masked image.
BACKENDS = {
    "native": partial(TileSupport, native=True),
    "reference": partial(TileSupport, native=False),
    "dense": MaskedSupport,
}

MINKOWSKI = "minkowski"  # the backend with parameters and an encoder of its own, fcmae.minkowski


def resolve_backend(name: str) -> str:
    """The backend that `auto` stands for, or `name` itself. Raises UsageError for an unknown one."""
    if name == "auto":
        return "native"
    known = ("auto", *BACKENDS, MINKOWSKI)
    if name not in known:
        raise UsageError(f"unknown sparse.backend {name!r}; known: {', '.join(known)}{nearest(name, known)}")
    return name
