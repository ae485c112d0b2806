"""FCMAE: a fully convolutional masked autoencoder (arXiv 2301.00808 §3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.kernels.tiles import Tiles
from fcmae.layouts import LAYOUTS
from fcmae.loss import check_window, masked_pixel_loss
from fcmae.masking import check_mask, grid_size, keep_count, mask_from_noise
from fcmae.models.convnextv2 import STRIDE, ConvNeXtV2
from fcmae.models.layers import Block
from fcmae.models.support import BACKENDS, MINKOWSKI, DenseSupport, resolve_backend


class FCMAE(nn.Module):
    """ConvNeXt V2 encoder on the visible 32x32 regions, ConvNeXt V2 decoder on the full grid, masked-pixel loss.

    image_size: pixels, one number or (H, W), multiples of 32: the size masks are drawn for; any other multiple of 32
    may be fed. in_chans: channels. depths, dims: blocks and widths of the encoder's four stages. decoder_dim,
    decoder_depth: width and blocks of the decoder. mask_ratio: share of regions hidden when no mask is given.
    norm_pix: normalize the target's pixels per window; norm_window: the window's side in pixels, 32 by default.
    grn: `per_image`, or `batch` to repeat the authors' sparse code. backend: a key of `BACKENDS`, `minkowski`, `auto`.
    With `minkowski` the encoder is of MinkowskiEngine's modules and its part of the state dict in their layout;
    `load_state_dict` then takes this layout, the others' and the authors' pretraining file's alike.
    Raises UsageError (a ValueError) for sizes, ratios or names that do not fit, or without MinkowskiEngine.
    """

    patch_size = mask_unit = STRIDE

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (40, 80, 160, 320),
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        mask_ratio: float = 0.6,
        norm_pix: bool = True,
        norm_window: int | None = None,
        grn: str = "per_image",
        backend: str = "auto",
    ):
        super().__init__()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        gh, gw = grid_size(self.image_size, self.mask_unit)
        keep_count(gh * gw, mask_ratio)
        if norm_pix:
            check_window(self.image_size, norm_window or STRIDE)
        self.mask_ratio, self.norm_pix, self.norm_window = mask_ratio, norm_pix, norm_window
        self.backend = resolve_backend(backend)
        self.in_chans = in_chans
        self.encoder = ConvNeXtV2(in_chans, depths, dims, grn)
        self.proj = nn.Linear(dims[-1], decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, decoder_dim))
        self.decoder = nn.ModuleList(Block(decoder_dim) for _ in range(decoder_depth))
        self.pred = nn.Linear(decoder_dim, STRIDE * STRIDE * in_chans)
        self.apply(_init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        if self.backend == MINKOWSKI:
            from fcmae.minkowski.encoder import MinkowskiConvNeXtV2

            self.encoder = MinkowskiConvNeXtV2(self.encoder)
            self.register_load_state_dict_pre_hook(_to_minkowski_layout)

    def forward(self, images: Tensor, mask: Tensor | Tiles | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (scalar, fp32), prediction (B, L, 32*32*C) in pixel order (p, p, C), and the mask used (B, gh, gw) bool.

        images: (B, C, H, W). mask: True = masked, the same number in every image; drawn at random if left out; the
        tables of a mask, `Tiles`, spare the check and its host synchronisation.
        """
        tiles = self.tiles(images, mask)
        if tiles.keep.shape[1] == tiles.mask[0].numel():
            raise UsageError("the mask hides none of the regions, so there is no loss; use encode() for features")
        pred = self.decode(self._sparse_features(images, tiles), tiles)
        loss = masked_pixel_loss(pred, images, tiles.mask, self.patch_size, self.norm_pix, self.norm_window)
        return loss, pred, tiles.mask

    def encode(self, images: Tensor, mask: Tensor | Tiles | None = None) -> Tensor:
        """Features (B, dims[3], H/32, W/32), zeros where masked; without a mask, those of the dense network."""
        if mask is not None:
            features = self._sparse_features(images, self.tiles(images, mask))
        elif self.backend == MINKOWSKI:
            visible = torch.zeros(images.shape[0], *self._grid(images), dtype=torch.bool, device=images.device)
            features = self.encoder(images, self.tiles(images, visible))
        else:
            self._grid(images)
            features = self.encoder(images, DenseSupport())
        return features.permute(0, 3, 1, 2)

    def decode(self, features: Tensor, tiles: Tiles) -> Tensor:
        """Prediction (B, L, 32*32*C) from encoder features (B, gh, gw, dims[3])."""
        x = torch.where(tiles.mask[..., None], self.mask_token, self.proj(features))
        for block in self.decoder:
            x = block(x, DenseSupport())
        return self.pred(x).flatten(1, 2)

    def tiles(self, images: Tensor, mask: Tensor | Tiles | None = None) -> Tiles:
        """The tables of a mask over these images, drawn if there is none. Raises UsageError if it does not fit."""
        if isinstance(mask, Tiles):
            return mask
        b, (gh, gw) = images.shape[0], self._grid(images)
        if mask is None:
            keep = keep_count(gh * gw, self.mask_ratio)
            mask = mask_from_noise(torch.rand(b, gh, gw, device=images.device), keep)
        elif torch.compiler.is_compiling():
            # A traced graph needs the count as a constant; that each image keeps it is asserted as the graph runs.
            keep = keep_count(gh * gw, self.mask_ratio)
            kept = ((~mask).flatten(1).sum(1) == keep).all()
            torch._assert_async(kept, "under torch.compile a mask must keep what the model's mask_ratio keeps")
        else:
            keep = check_mask(mask, b, (gh, gw))
        return Tiles.from_mask(mask, keep)

    def _sparse_features(self, images: Tensor, tiles: Tiles) -> Tensor:
        return self.encoder(images, tiles if self.backend == MINKOWSKI else BACKENDS[self.backend](tiles))

    def _grid(self, images: Tensor) -> tuple[int, int]:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise UsageError(f"images must be (B, {self.in_chans}, H, W); got {tuple(images.shape)}")
        return grid_size(tuple(images.shape[-2:]), self.mask_unit)


def _init_weights(module: nn.Module) -> None:
    # Once, and std 0.02 for every kernel: the authors' class initialises twice, the second time with std 1.
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _to_minkowski_layout(model: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    own = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
    if LAYOUTS["official"].recognises(own):
        own = LAYOUTS["official"].to_fcmae(own)
    state.update({prefix + key: value for key, value in LAYOUTS["minkowski"].from_fcmae(own).items()})
