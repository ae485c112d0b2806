"""The sizes of a ViT and of MAE's decoder, read from a state dict's shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fcmae.layouts.positions import fixed_grid, grid_of, squarest
from fcmae.layouts.sizes import Spec, Told, count_blocks
from fcmae.models import VIT_SIZES
from fcmae.models.mae import MAE


@dataclass(frozen=True, kw_only=True)
class VitSpec(Spec):
    """ViT. tokens: patches of the images its positions are for. fc_norm: whether its last norm follows the mean of the
    patches' tokens, instead of being the encoder's. encoder_mask_tokens: whether the encoder has them, not the decoder.
    heads, decoder_heads, size: as `Told`, None where nobody knows."""

    patch_size: int
    tokens: int
    dim: int
    depth: int
    fc_norm: bool = False
    encoder_mask_tokens: bool = False
    heads: int | None = None
    size: tuple[int, int] | None = None

    family, title = "vit", "ViT"
    stem = "patch_embed.proj.weight"
    decoder_keys = ("mask_token", "encoder_mask_token", "decoder_", "target.")
    head_keys = ("head.", "fc_norm.")

    @classmethod
    def read(cls, state: dict[str, Tensor], told: Told) -> VitSpec:
        """From a state dict in this toolkit's layout; KeyError, IndexError or ValueError where that is not possible.

        What is not told: the heads are the published ones of such a width, the size is the one of fixed positions, or
        the square of so many patches, if there is such.
        """
        dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
        inner = {int(key.split(".")[1]) for key in state if key.startswith("decoder_blocks.")}
        tokens = state["pos_embed"].shape[1] - 1
        in_encoder = "encoder_mask_token" in state
        width = state["mask_token"].shape[-1] if "mask_token" in state else None
        width = state["decoder_embed.weight"].shape[0] if in_encoder else width
        grid = grid_of(told.size, patch_size) if told.size else fixed_grid(state["pos_embed"]) or squarest(tokens)
        if grid[0] * grid[1] != tokens:
            raise ValueError(f"{told.size[0]}x{told.size[1]} pixels are not its {tokens} patches of {patch_size}")
        known = told.size or grid[0] == grid[1] or fixed_grid(state["pos_embed"])
        published = {size[1]: size[3] for size in VIT_SIZES.values()}
        heads = published.get(dim) if told.heads is None else told.heads
        decoder_heads = {512: 16}.get(width) if told.decoder_heads is None else told.decoder_heads
        for name, of, number in (("heads", dim, heads), ("decoder heads", width, decoder_heads)):
            if None not in (of, number) and (number < 1 or of % number):
                raise ValueError(f"a width of {of} does not divide into {number} {name}")
        return cls(
            in_chans=in_chans,
            patch_size=patch_size,
            tokens=tokens,
            dim=dim,
            depth=count_blocks((key.split(".")[1] for key in state if key.startswith("blocks.")), "blocks."),
            decoder=(width, len(inner)) if width else None,
            pca=state["target.basis"].shape[0] if "target.basis" in state else None,
            encoder_mask_tokens=in_encoder,
            classes=state["head.weight"].shape[0] if "head.weight" in state else None,
            fc_norm="fc_norm.weight" in state,
            heads=heads,
            decoder_heads=decoder_heads if width else None,
            size=(grid[0] * patch_size, grid[1] * patch_size) if known else None,
        )

    @property
    def name(self) -> str | None:
        for size, (patch, dim, depth, _) in VIT_SIZES.items():
            if (patch, dim, depth) == self.encoder:
                return f"vit_{size}_patch{patch}_224"
        return None

    @property
    def running_heads(self) -> int:
        """The heads, or where nobody knows them some with which a state dict is run and held against another."""
        return self.heads or max(h for h in range(1, max(1, self.dim // 64) + 1) if self.dim % h == 0)

    @property
    def running_decoder_heads(self) -> int:
        return self.decoder_heads or 1

    @property
    def encoder(self) -> tuple:
        return self.patch_size, self.dim, self.depth

    @property
    def image_size(self) -> tuple[int, int]:
        """The size, or where nobody knows it the squarest one of so many patches, with which all of them are run."""
        rows, columns = squarest(self.tokens)
        return self.size or (rows * self.patch_size, columns * self.patch_size)

    def demands(self, with_decoder: bool) -> dict[str, str]:
        found = super().demands(with_decoder)
        if self.fc_norm:
            found["average"] = "a ViT whose last norm follows the mean of its tokens (fc_norm)"
        if with_decoder and self.encoder_mask_tokens:
            found["variants"] = "an encoder that sees mask tokens"
        return found

    @property
    def pretraining(self) -> tuple:
        return *super().pretraining, self.encoder_mask_tokens

    @property
    def untold(self) -> list[str]:
        needs = {"--heads N": self.heads, "--image-size H W": self.size}
        if self.decoder:
            needs["--decoder-heads N"] = self.decoder_heads
        return [option for option, value in needs.items() if value is None]

    def __str__(self) -> str:
        said = self._described(f"ViT of width {self.dim}, depth {self.depth} and patches of {self.patch_size}")
        size = f" of {self.size[0]} x {self.size[1]} pixels" if self.size else ""
        average = ", a norm after the mean of its tokens" if self.fc_norm else ""
        tokens = ", mask tokens in the encoder" if self.encoder_mask_tokens else ""
        return f"{said}, {self.heads or 'unknown'} heads, {self.tokens} patches{size}{average}{tokens}"

    def make(self) -> MAE:
        """A model of these sizes, with a decoder of some where there is none."""
        width, blocks = self.decoder or (4, 0)
        return MAE(
            self.image_size, self.in_chans, self.patch_size, dim=self.dim, depth=self.depth, heads=self.running_heads,
            decoder_dim=width, decoder_depth=blocks, decoder_heads=self.running_decoder_heads, mask_ratio=0.5,
            pca=self.pca, encoder_mask_tokens=self.encoder_mask_tokens,
        )  # fmt: skip

    def shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            state = self.make().state_dict()
            if self.fc_norm:
                state |= {f"fc_norm.{k}": state.pop(f"norm.{k}") for k in ("weight", "bias")}
            if self.classes:
                state |= {f"head.{k}": x for k, x in nn.Linear(self.dim, self.classes).state_dict().items()}
        return {key: x.shape for key, x in state.items() if self.decoder or self.part(key) != "decoder"}
