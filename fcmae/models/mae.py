"""MAE: a masked autoencoder of Vision Transformers (arXiv 2111.06377 §3)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.kernels.tiles import Tiles, pack, unpack
from fcmae.loss import spread
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.layers import PatchConv
from fcmae.models.vit import LayerNorm, check_sizes, check_width, positions, vit_blocks


class MAE(MaskedAutoencoder):
    """ViT encoder on the visible patches, ViT decoder on all of them with mask tokens, masked-pixel loss.

    image_size: pixels, one number or (H, W), multiples of mask_unit; positions are fixed to it. in_chans: channels.
    patch_size: side of a patch, one token. mask_unit: side of what is hidden as a whole, any multiple of the patch,
    which it is by default; 32 shares masks with FCMAE. dim, depth, heads: width, blocks and attention heads of the
    encoder; decoder_dim, decoder_depth, decoder_heads of the decoder. mask_ratio: share of regions hidden when no mask
    is given. norm_pix: normalize the target's pixels per window; norm_window: the window's side, the patch by default.
    pca: predict so many principal components of a patch in place of its pixels. encoder_mask_tokens: the encoder sees
    every patch, a learned token in place of the masked ones, and the decoder needs none (table 1c, "encoder w/ [M]").
    The state dict is that of the authors' class, and the encoder's part of it timm's `vit_*`; with mask tokens in the
    encoder it has `encoder_mask_token` (1, 1, dim) instead of `mask_token` (1, 1, decoder_dim).
    Raises UsageError (a ValueError) for sizes or ratios that do not fit.
    """

    decoder, fixed_size = "vit", True

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
        pca: int | None = None,
        encoder_mask_tokens: bool = False,
    ):
        mask_unit = patch_size if mask_unit is None else mask_unit
        check_sizes(in_chans=in_chans, patch_size=patch_size, mask_unit=mask_unit, depth=depth)
        if mask_unit % patch_size:
            raise UsageError(f"mask_unit={mask_unit} must be a multiple of patch_size={patch_size}")
        check_width(dim, heads, "")
        check_width(decoder_dim, decoder_heads, "decoder_")
        super().__init__(image_size, in_chans, patch_size, mask_unit, mask_ratio, norm_pix, norm_window, pca)
        self.heads, self.decoder_heads, self.encoder_mask_tokens = heads, decoder_heads, encoder_mask_tokens
        grid = self.image_size[0] // patch_size, self.image_size[1] // patch_size
        # One matmul over the visible patches alone; timm's PatchEmbed, of the same parameters, takes whole images.
        self.patch_embed = nn.Sequential(OrderedDict(proj=PatchConv(in_chans, dim, patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        # Buffers: in the state dict, as the authors' file has them, and out of the optimizer's sight.
        self.register_buffer("pos_embed", positions(grid, dim))
        self.blocks = vit_blocks(dim, depth, heads)
        self.norm = LayerNorm(dim)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        if encoder_mask_tokens:
            self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        else:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.register_buffer("decoder_pos_embed", positions(grid, decoder_dim))
        self.decoder_blocks = vit_blocks(decoder_dim, decoder_depth, decoder_heads)
        self.decoder_norm = LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, self.predicted)
        self.apply(_init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.encoder_mask_token if encoder_mask_tokens else self.mask_token, std=0.02)

    def predict(self, images: Tensor, tiles: Tiles) -> Tensor:
        """Prediction (B, L, p*p*C), pixel order (p, p, C), from the visible regions of images (B, C, H, W).

        With `pca` (B, L, pca).
        """
        tiles = self._patches(tiles)
        return self.decode(self._tokens(images, tiles), tiles)

    def encode(self, images: Tensor, mask: Tensor | Tiles | None = None) -> Tensor:
        """Class token and visible patches in row-major order, (B, 1+K, dim), normed; without a mask, all patches.

        With `encoder_mask_tokens` all patches (B, 1+L, dim) always, what is masked unseen.
        """
        if mask is not None:
            return self._tokens(images, self._patches(self.tiles(images, mask)))
        self.grid(images)
        return self._tokens(images, None)

    def decode(self, tokens: Tensor, tiles: Tiles) -> Tensor:
        """Prediction (B, L, p*p*C), with `pca` (B, L, pca), from what `encode` gives; tiles: of single patches."""
        x = self.decoder_embed(tokens)
        if not self.encoder_mask_tokens:
            x = torch.cat([x[:, :1], _filled(x[:, 1:], tiles, self.mask_token)], 1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))

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
        """The encoder's output (B, 1+K, dim), or (B, 1+L, dim); tiles: of single patches, None for every patch."""
        pixels, positions = images.permute(0, 2, 3, 1), self.pos_embed[0, 1:]
        if tiles is not None:
            pixels = pack(pixels, tiles)
        x = self.patch_embed(pixels).flatten(1, -2)
        if tiles is not None and self.encoder_mask_tokens:
            x = _filled(x, tiles, self.encoder_mask_token)
        elif tiles is not None:
            positions = positions[tiles.keep]
        x = x + positions
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _patches(self, tiles: Tiles) -> Tiles:
        """The tables at the granularity of patches from those of mask units."""
        times = self.mask_unit // self.patch_size
        return tiles if times == 1 else Tiles.from_mask(spread(tiles.mask, times), tiles.keep.shape[1] * times**2)


def _filled(patches: Tensor, tiles: Tiles, token: Tensor) -> Tensor:
    """All patches (B, L, D) from the visible ones (B, K, D), `token` where masked."""
    grid = unpack(patches[:, :, None, None], tiles)  # (B, gh, gw, D)
    return torch.where(tiles.mask[..., None], token, grid).flatten(1, 2)


def _init_weights(module: nn.Module) -> None:
    # The patch embedding too, as the matrix that it is.
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)
