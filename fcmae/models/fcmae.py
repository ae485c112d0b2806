"""FCMAE: a fully convolutional masked autoencoder (arXiv 2301.00808 §3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.kernels.devices import active
from fcmae.kernels.tiles import Tiles
from fcmae.layouts import LAYOUTS
from fcmae.minkowski import engine
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.convnextv2 import STRIDE, ConvNeXtV2
from fcmae.models.decoders import DECODERS, HEADS, DecoderSizes, find_decoder
from fcmae.models.layers import LAYER_SCALE
from fcmae.models.support import BACKENDS, MINKOWSKI, DenseSupport, resolve_backend


class FCMAE(MaskedAutoencoder):
    """ConvNeXt V2 encoder on the visible 32x32 regions, a small decoder on the full grid, masked-pixel loss.

    image_size: pixels, one number or (H, W), multiples of 32: the size masks are drawn for; any other multiple of 32
    may be fed. in_chans: channels. depths, dims: blocks and widths of the encoder's four stages. decoder_dim,
    decoder_depth: width and blocks of the decoder. mask_ratio: share of regions hidden when no mask is given.
    norm_pix: normalize the target's pixels per window; norm_window: the window's side in pixels, 32 by default.
    grn: `per_image`, or `batch` to repeat the authors' sparse code. backend: a key of `BACKENDS`, `minkowski`, `auto`.
    norm: in the blocks of encoder and decoder, `grn` or another of `norms.NORMS`. decoder: `convnext` blocks as
    published, `vit` blocks (of decoder_heads, 16 by default; images are then of image_size only), or `unet`, a U-Net
    with skips. pca: predict so many principal components of a region in place of its pixels.
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
        norm: str = "grn",
        decoder: str = "convnext",
        decoder_heads: int | None = None,
        pca: int | None = None,
    ):
        super().__init__(image_size, in_chans, self.patch_size, self.mask_unit, mask_ratio, norm_pix, norm_window, pca)
        self.backend, self.grn, self.norm = resolve_backend(backend), grn, norm
        self.decoder_kind, kind = decoder, find_decoder(decoder, decoder_heads)
        heads = (HEADS if decoder_heads is None else decoder_heads) if decoder == "vit" else None
        self.fixed_size, self.decoder_heads = kind.fixed_size, heads
        if self.backend == MINKOWSKI:
            _check_minkowski(norm, kind.skips, decoder)
        self.encoder = ConvNeXtV2(in_chans, depths, dims, grn, norm)
        grid = self.image_size[0] // STRIDE, self.image_size[1] // STRIDE
        sizes = DecoderSizes(
            tuple(dims), decoder_dim, decoder_depth, heads, norm, grid, STRIDE, in_chans, self.predicted
        )  # fmt: skip
        kind.build(self, sizes)
        self.apply(_init_weights)
        for name, parameter in self.named_parameters():
            if name.startswith("mask_token"):
                nn.init.normal_(parameter, std=0.02)
        if self.backend == MINKOWSKI:
            from fcmae.minkowski.encoder import MinkowskiConvNeXtV2

            self.encoder = MinkowskiConvNeXtV2(self.encoder)
            self.register_load_state_dict_pre_hook(_to_minkowski_layout)

    def predict(self, images: Tensor, tiles: Tiles) -> Tensor:
        """Prediction (B, L, 32*32*C), pixel order (p, p, C), from the visible regions of images (B, C, H, W).

        With `pca` (B, L, pca).
        """
        if DECODERS[self.decoder_kind].skips:
            return self.decode(self.encoder.maps(images, BACKENDS[self.backend](tiles)), tiles)
        return self.decode(self._sparse_features(images, tiles), tiles)

    def encode(self, images: Tensor, mask: Tensor | Tiles | None = None) -> Tensor:
        """Features (B, dims[3], H/32, W/32), zeros where masked; without a mask, those of the dense network."""
        if mask is not None:
            features = self._sparse_features(images, self.tiles(images, mask))
        elif self.backend == MINKOWSKI:
            visible = torch.zeros(images.shape[0], *self.grid(images), dtype=torch.bool, device=images.device)
            features = self.encoder(images, self.tiles(images, visible))
        else:
            self.grid(images)
            features = self.encoder(images, DenseSupport())
        return features.permute(0, 3, 1, 2)

    def decode(self, features: Tensor | list[Tensor], tiles: Tiles) -> Tensor:
        """Prediction (B, L, 32*32*C) from encoder features (B, gh, gw, dims[3]); of `unet` from `encoder.maps`."""
        return DECODERS[self.decoder_kind].decode(self, features, tiles)

    def describe_encoder(self, device: torch.device) -> str:
        """The backend, what it runs there, and GRN's pooling or the norm in its place."""
        running = {"native": lambda: f": {active(device)}", MINKOWSKI: lambda: f": {engine.describe()}"}
        norm = f"GRN {self.grn}" if self.norm == "grn" else f"norm {self.norm}"
        return f"{self.backend}{running.get(self.backend, str)()}, {norm}"

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the encoder."""
        return self.encoder.parameters()

    def timm_arguments(self) -> dict[str, object] | None:
        """The channels, and what makes ConvNeXt V1's block; None for a norm in the block that timm does not have."""
        if self.norm not in ("grn", "none"):
            return None
        v1 = {"use_grn": False, "ls_init_value": LAYER_SCALE} if self.norm == "none" else {}
        return {**super().timm_arguments(), **v1}

    def _sparse_features(self, images: Tensor, tiles: Tiles) -> Tensor:
        return self.encoder(images, tiles if self.backend == MINKOWSKI else BACKENDS[self.backend](tiles))


def _check_minkowski(norm: str, skips: bool, decoder: str) -> None:
    if norm != "grn":
        raise UsageError(f"sparse.backend=minkowski has GRN only, not model.norm={norm}; use another backend")
    if skips:
        raise UsageError(
            f"sparse.backend=minkowski gives the last stage's map only, and model.decoder={decoder} needs all; use "
            f"another backend"
        )


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
