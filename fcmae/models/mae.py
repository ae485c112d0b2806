"""MAE: a masked autoencoder of Vision Transformers (arXiv 2111.06377 §3)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.kernels.tiles import Tiles, pack, unpack
from fcmae.loss import spread
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.layers import PatchConv

_LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class MAE(MaskedAutoencoder):
    """ViT encoder on the visible patches, ViT decoder on all of them with mask tokens, masked-pixel loss.

    image_size: pixels, one number or (H, W), multiples of mask_unit; positions are fixed to it. in_chans: channels.
    patch_size: side of a patch, one token. mask_unit: side of what is hidden as a whole, any multiple of the patch,
    which it is by default; 32 shares masks with FCMAE. dim, depth, heads: width, blocks and attention heads of the
    encoder; decoder_dim, decoder_depth, decoder_heads of the decoder. mask_ratio: share of regions hidden when no mask
    is given. norm_pix: normalize the target's pixels per window; norm_window: the window's side, the patch by default.
    The state dict is that of the authors' class, and the encoder's part of it timm's `vit_*`.
    Raises UsageError (a ValueError) for sizes or ratios that do not fit.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        patch_size: int = 16,
        mask_unit: int | None = None,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        norm_window: int | None = None,
    ):
        mask_unit = patch_size if mask_unit is None else mask_unit
        _check_sizes(in_chans=in_chans, patch_size=patch_size, mask_unit=mask_unit, depth=depth)
        if mask_unit % patch_size:
            raise UsageError(f"mask_unit={mask_unit} must be a multiple of patch_size={patch_size}")
        _check_width(dim, heads, "")
        _check_width(decoder_dim, decoder_heads, "decoder_")
        super().__init__(image_size, in_chans, patch_size, mask_unit, mask_ratio, norm_pix, norm_window)
        self.heads, self.decoder_heads = heads, decoder_heads
        grid = self.image_size[0] // patch_size, self.image_size[1] // patch_size
        # One matmul over the visible patches alone; timm's PatchEmbed, of the same parameters, takes whole images.
        self.patch_embed = nn.Sequential(OrderedDict(proj=PatchConv(in_chans, dim, patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # Buffers: in the state dict, as the authors' file has them, and out of the optimizer's sight.
        self.register_buffer("pos_embed", positions(grid, dim))
        self.blocks = _blocks(dim, depth, heads)
        self.norm = _LayerNorm(dim)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.register_buffer("decoder_pos_embed", positions(grid, decoder_dim))
        self.decoder_blocks = _blocks(decoder_dim, decoder_depth, decoder_heads)
        self.decoder_norm = _LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size * patch_size * in_chans)
        self.apply(_init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def predict(self, images: Tensor, tiles: Tiles) -> Tensor:
        """Prediction (B, L, p*p*C), pixel order (p, p, C), from the visible regions of images (B, C, H, W)."""
        tiles = self._patches(tiles)
        return self.decode(self._tokens(images, tiles), tiles)

    def encode(self, images: Tensor, mask: Tensor | Tiles | None = None) -> Tensor:
        """Class token and visible patches in row-major order, (B, 1+K, dim), normed; without a mask, all patches."""
        if mask is not None:
            return self._tokens(images, self._patches(self.tiles(images, mask)))
        self.grid(images)
        return self._tokens(images, None)

    def decode(self, tokens: Tensor, tiles: Tiles) -> Tensor:
        """Prediction (B, L, p*p*C) from the encoder's tokens (B, 1+K, dim); tiles: of single patches."""
        x = self.decoder_embed(tokens)
        patches = unpack(x[:, 1:, None, None], tiles)  # (B, gh, gw, decoder_dim)
        patches = torch.where(tiles.mask[..., None], self.mask_token, patches)
        x = torch.cat([x[:, :1], patches.flatten(1, 2)], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Regions (gh, gw) of images (B, C, H, W). Raises UsageError unless they are of the model's size."""
        found = super().grid(images)
        if tuple(images.shape[-2:]) != self.image_size:
            h, w = self.image_size
            raise UsageError(
                f"images are {images.shape[-2]}x{images.shape[-1]} and this model's positions {h}x{w}; "
                f"build it with the images' image_size"
            )
        return found

    def describe_encoder(self, device: torch.device) -> str:
        """How attention is computed."""
        if self.blocks[0].attn.fused_attn:
            return "timm's blocks, scaled_dot_product_attention"
        return "timm's blocks, unfused attention as TIMM_FUSED_ATTN asks for"

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the encoder."""
        return (p for name, p in self.named_parameters() if not name.startswith(("decoder_", "mask_token")))

    def timm_arguments(self) -> dict[str, object]:
        """The channels, and the size that positions are for."""
        return {**super().timm_arguments(), "img_size": self.image_size}

    def _tokens(self, images: Tensor, tiles: Tiles | None) -> Tensor:
        """The encoder's output (B, 1+K, dim); tiles: of single patches, None for every patch."""
        pixels, positions = images.permute(0, 2, 3, 1), self.pos_embed[0, 1:]
        if tiles is not None:
            pixels, positions = pack(pixels, tiles), positions[tiles.keep]
        x = self.patch_embed(pixels).flatten(1, -2) + positions
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _patches(self, tiles: Tiles) -> Tiles:
        """The tables at the granularity of patches from those of mask units."""
        times = self.mask_unit // self.patch_size
        return tiles if times == 1 else Tiles.from_mask(spread(tiles.mask, times), tiles.keep.shape[1] * times**2)


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


def _blocks(dim: int, depth: int, heads: int) -> nn.ModuleList:
    from timm.models.vision_transformer import Block  # seconds to import, which a ConvNet need not wait for

    return nn.ModuleList(Block(dim, heads, qkv_bias=True, norm_layer=_LayerNorm) for _ in range(depth))


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UsageError(f"{name}={value} must be 1 or more")


def _check_width(dim: int, heads: int, prefix: str) -> None:
    _check_sizes(**{f"{prefix}dim": dim, f"{prefix}heads": heads})
    if dim % 4:
        raise UsageError(f"{prefix}dim={dim} must be a multiple of 4, for sines and cosines of rows and columns")
    if dim % heads:
        raise UsageError(f"{prefix}dim={dim} must be a multiple of {prefix}heads={heads}")


def _init_weights(module: nn.Module) -> None:
    # The patch embedding too, as the matrix that it is.
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)
