"""The decoders of FCMAE: from the visible regions' features to a prediction of every region.

ConvNeXt V2 compares such designs (arXiv 2301.00808 §3.1). A kind builds its parts into the model, at whose top level
checkpoints have them: `proj` to the decoder's width, `mask_token`, `decoder`, its blocks, and `pred`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError, nearest
from fcmae.kernels.tiles import Tiles
from fcmae.loss import spread
from fcmae.models.layers import Block
from fcmae.models.support import DenseSupport
from fcmae.models.vit import LayerNorm, check_sizes, check_width, positions, vit_blocks

UNET_WIDTH = 8  # the least width of a U-Net's level
HEADS = 16  # of ViT blocks, where no other number is given


@dataclass(frozen=True)
class DecoderSizes:
    """dims: the encoder's widths. dim, depth, heads (of ViT blocks): the decoder's. norm: in ConvNeXt blocks. grid:
    regions (gh, gw) of the model's images. stride: pixels of a region's side. in_chans: of images. predicted: numbers
    for a region."""

    dims: tuple[int, ...]
    dim: int
    depth: int
    heads: int | None
    norm: str
    grid: tuple[int, int]
    stride: int
    in_chans: int
    predicted: int


class ConvNeXtDecoder:
    """ConvNeXt V2 blocks on the grid, the published design.

    skips: whether it wants the maps of all of the encoder's stages; fixed_size: whether it takes one size of image.
    """

    skips = fixed_size = False

    @staticmethod
    def build(model: nn.Module, sizes: DecoderSizes) -> None:
        """Add the decoder's modules and parameters to `model`. Raises UsageError for sizes that do not fit."""
        check_sizes(decoder_dim=sizes.dim)
        model.proj = nn.Linear(sizes.dims[-1], sizes.dim)
        model.mask_token = nn.Parameter(torch.zeros(1, 1, 1, sizes.dim))
        model.decoder = nn.ModuleList(Block(sizes.dim, norm=sizes.norm) for _ in range(sizes.depth))
        model.pred = nn.Linear(sizes.dim, sizes.predicted)

    @staticmethod
    def decode(model: nn.Module, features: Tensor, tiles: Tiles) -> Tensor:
        """Prediction (B, L, predicted) from features (B, gh, gw, dims[3]), with `skips` one map of each stage."""
        x = torch.where(tiles.mask[..., None], model.mask_token, model.proj(features))
        for block in model.decoder:
            x = block(x, DenseSupport())
        return model.pred(x).flatten(1, 2)


class ViTDecoder:
    """MAE's decoder on the grid's regions (arXiv 2111.06377 §3): fixed positions, ViT blocks, a last norm."""

    skips, fixed_size = False, True

    @staticmethod
    def build(model: nn.Module, sizes: DecoderSizes) -> None:
        """As `ConvNeXtDecoder.build`."""
        check_width(sizes.dim, sizes.heads, "decoder_")
        model.proj = nn.Linear(sizes.dims[-1], sizes.dim)
        model.mask_token = nn.Parameter(torch.zeros(1, 1, 1, sizes.dim))
        model.register_buffer("decoder_pos_embed", positions(sizes.grid, sizes.dim)[:, 1:])  # there is no class token
        model.decoder = vit_blocks(sizes.dim, sizes.depth, sizes.heads)
        model.decoder_norm = LayerNorm(sizes.dim)
        model.pred = nn.Linear(sizes.dim, sizes.predicted)

    @staticmethod
    def decode(model: nn.Module, features: Tensor, tiles: Tiles) -> Tensor:
        """As `ConvNeXtDecoder.decode`."""
        x = torch.where(tiles.mask[..., None], model.mask_token, model.proj(features))
        x = x.flatten(1, 2) + model.decoder_pos_embed
        for block in model.decoder:
            x = block(x)
        return model.pred(model.decoder_norm(x))


class UNetDecoder:
    """A U-Net's way up with skips: from stride 32 to 4 the encoder's map of each level, in the decoder's width there,
    a mask token where masked, and what comes from below, upsampled; then ConvNeXt blocks. It predicts the 4x4 pixels of
    each position, or where pixels are not the target, from a region's 8x8 positions together.

    decoder_dim is the width at stride 32, halved at each level, to 8 at least.
    """

    skips, fixed_size = True, False

    @staticmethod
    def build(model: nn.Module, sizes: DecoderSizes) -> None:
        """As `ConvNeXtDecoder.build`."""
        widths = _unet_widths(sizes.dim)
        model.proj = nn.ModuleList(nn.Linear(c, w) for c, w in zip(sizes.dims[::-1], widths, strict=True))
        model.mask_token = nn.ParameterList(torch.zeros(1, 1, 1, w) for w in widths)
        model.up = nn.ModuleList(nn.Linear(below, 4 * w) for below, w in pairwise(widths))
        model.decoder = nn.ModuleList(
            nn.ModuleList(Block(w, norm=sizes.norm) for _ in range(sizes.depth)) for w in widths
        )
        side = 2 ** (len(widths) - 1)  # positions along a region at the last level
        if model.target is None:
            model.pred = nn.Linear(widths[-1], (sizes.stride // side) ** 2 * sizes.in_chans)
        else:
            model.pred = nn.Linear(side * side * widths[-1], sizes.predicted)

    @staticmethod
    def decode(model: nn.Module, features: list[Tensor], tiles: Tiles) -> Tensor:
        """As `ConvNeXtDecoder.decode`."""
        x = None
        for level, skip in enumerate(features[::-1]):
            mask = spread(tiles.mask, 2**level)[..., None]
            y = torch.where(mask, model.mask_token[level], model.proj[level](skip))
            x = y if x is None else y + _upsampled(model.up[level - 1](x))
            for block in model.decoder[level]:
                x = block(x, DenseSupport())
        (b, h, w, c), (gh, gw) = x.shape, tiles.grid
        if model.target is not None:
            regions = x.view(b, gh, h // gh, gw, w // gw, c).transpose(2, 3)
            return model.pred(regions.flatten(3).flatten(1, 2))
        p = model.patch_size * gh // h  # pixels of a position
        pixels = model.pred(x).view(b, gh, h // gh, gw, w // gw, p, p, -1)
        return pixels.permute(0, 1, 3, 2, 5, 4, 6, 7).reshape(b, gh * gw, -1)


DECODERS = {"convnext": ConvNeXtDecoder, "vit": ViTDecoder, "unet": UNetDecoder}


def find_decoder(kind: str, heads: int | None) -> type[ConvNeXtDecoder | ViTDecoder | UNetDecoder]:
    """The decoder of a name. Raises UsageError for an unknown one, or heads for one that has no attention."""
    if kind not in DECODERS:
        raise UsageError(f"unknown model.decoder {kind!r}; known: {', '.join(DECODERS)}{nearest(kind, DECODERS)}")
    if heads is not None and kind != "vit":
        raise UsageError(f"model.decoder_heads={heads} is of model.decoder=vit; {kind} has no such setting")
    return DECODERS[kind]


def _unet_widths(dim: int) -> list[int]:
    """The decoder's widths at strides 32, 16, 8, 4."""
    if dim < UNET_WIDTH:
        raise UsageError(f"decoder_dim={dim} must be {UNET_WIDTH} or more for decoder=unet")
    widths = [dim]
    while len(widths) < 4:
        half, odd = divmod(widths[-1], 2)
        if odd and half >= UNET_WIDTH:
            raise UsageError(f"decoder_dim={dim} cannot be halved at each level of decoder=unet: {widths[-1]} is odd")
        widths.append(max(UNET_WIDTH, half))
    return widths


def _upsampled(x: Tensor) -> Tensor:
    """(B, H, W, 4C) to (B, 2H, 2W, C), the channels being those of 2x2 positions."""
    b, h, w, c = x.shape
    return x.view(b, h, w, 2, 2, c // 4).transpose(2, 3).reshape(b, 2 * h, 2 * w, c // 4)
