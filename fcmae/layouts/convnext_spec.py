"""The sizes of a ConvNeXt and of FCMAE's decoder, read from a state dict's shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fcmae.layouts.positions import grid_of, squarest
from fcmae.layouts.sizes import Spec, Told, count_blocks
from fcmae.models import CONVNEXTV2_SIZES
from fcmae.models.convnextv2 import STRIDE
from fcmae.models.decoders import HEADS
from fcmae.models.fcmae import FCMAE


@dataclass(frozen=True, kw_only=True)
class ConvNextSpec(Spec):
    """ConvNeXt V2. norm: whether there is a norm after the encoder, which FCMAE does without. block_norm: that of
    its blocks, one of `norms.NORMS`. decoder_kind: one of `decoders.DECODERS`. size: (H, W) that positions are for."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    norm: bool = False
    block_norm: str = "grn"
    decoder_kind: str = "convnext"
    size: tuple[int, int] | None = None

    family, title = "convnext", "ConvNeXt V2"
    stem = "encoder.stem.0.weight"
    decoder_keys = ("proj.", "mask_token", "decoder.", "decoder_pos_embed", "decoder_norm.", "up.", "pred.", "target.")
    head_keys = ("norm.", "head.")

    @classmethod
    def read(cls, state: dict[str, Tensor], told: Told) -> ConvNextSpec:
        """From a state dict in this toolkit's layout; KeyError, IndexError or ValueError where that is not possible."""
        depths = []
        for i in range(4):
            stage = f"encoder.stages.{i}.blocks."
            depths.append(count_blocks((key.split(".")[4] for key in state if key.startswith(stage)), stage))
        norm = any(key.startswith("norm.") for key in state)
        if "head.weight" in state and not norm:
            raise ValueError("a classifier without the norm that comes before it")
        ends = {
            "mlp.grn.weight": "grn", "mlp.norm.running_mean": "bn", "mlp.norm.weight": "ln",
            "mlp.norm.constants": "lrn", "gamma": "none",
        }  # fmt: skip
        blocks = [key for key in state if key.startswith("encoder.stages.") and ".blocks." in key]
        found = (name for end, name in ends.items() if any(key.endswith(f".{end}") for key in blocks))
        kind, width, count, grid = _decoder_of(state, told)
        return cls(
            in_chans=state["encoder.stem.0.weight"].shape[1],
            depths=tuple(depths),
            dims=tuple(state[f"encoder.stages.{i}.blocks.0.conv_dw.weight"].shape[0] for i in range(4)),
            decoder=(width, count) if width else None,
            pca=state["target.basis"].shape[0] if "target.basis" in state else None,
            norm=norm,
            block_norm=next(found, "grn"),
            decoder_kind=kind,
            decoder_heads=told.decoder_heads if kind == "vit" else None,
            size=grid and (grid[0] * STRIDE, grid[1] * STRIDE),
            classes=state["head.weight"].shape[0] if "head.weight" in state else None,
        )

    @property
    def name(self) -> str | None:
        names = {sizes: f"convnextv2_{size}" for size, sizes in CONVNEXTV2_SIZES.items()}
        return names.get((self.depths, self.dims)) if self.block_norm in ("grn", "none") else None

    @property
    def encoder(self) -> tuple:
        return self.depths, self.dims, self.block_norm

    @property
    def image_size(self) -> tuple[int, int]:
        """Any will do, but where positions bind the decoder to one."""
        return self.size or (64, 96)

    @property
    def decoder_text(self) -> str:
        return {"convnext": "decoder", "vit": "ViT decoder", "unet": "U-Net decoder"}[self.decoder_kind]

    @property
    def running_decoder_heads(self) -> int | None:
        """The heads, or where nobody knows them some with which a state dict is run and held against another."""
        if self.decoder_kind != "vit":
            return None
        return self.decoder_heads or max(h for h in range(1, HEADS + 1) if self.decoder[0] % h == 0)

    @property
    def pretraining(self) -> tuple:
        return *super().pretraining, self.decoder_kind

    def demands(self, with_decoder: bool) -> dict[str, str]:
        found = super().demands(with_decoder)
        if self.block_norm == "none":
            found["layer_scale"] = "ConvNeXt V1's blocks, with LayerScale and without GRN"
        elif self.block_norm != "grn":
            found["norms"] = f"a ConvNeXt with norm {self.block_norm} in its blocks, for which there is no model there"
        if with_decoder and self.decoder_kind == "vit":
            found["variants"] = "a decoder of ViT blocks"
        if with_decoder and self.decoder_kind == "unet":
            found["skips"] = "a U-Net decoder"
        return found

    def __str__(self) -> str:
        said = self._described(f"ConvNeXt V2 of depths {list(self.depths)} and dims {list(self.dims)}")
        return said if self.block_norm == "grn" else f"{said}, norm {self.block_norm} in its blocks"

    def make(self, **settings) -> FCMAE:
        """A model of these sizes, with a decoder of some where there is none."""
        width, blocks = self.decoder or (8, 0)
        return FCMAE(
            self.image_size, self.in_chans, self.depths, self.dims, width, blocks, mask_ratio=0.5, norm=self.block_norm,
            decoder=self.decoder_kind, decoder_heads=self.running_decoder_heads, pca=self.pca, **settings,
        )  # fmt: skip

    def shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            state = self.make().state_dict()
            if self.norm:
                state |= {f"norm.{k}": x for k, x in nn.LayerNorm(self.dims[-1]).state_dict().items()}
            if self.classes:
                state |= {f"head.{k}": x for k, x in nn.Linear(self.dims[-1], self.classes).state_dict().items()}
        return {key: x.shape for key, x in state.items() if self.decoder or self.part(key) != "decoder"}


def _decoder_of(state: dict[str, Tensor], told: Told) -> tuple[str, int | None, int, tuple[int, int] | None]:
    """FCMAE's decoder in a state dict: its kind, width (None without one), blocks, and the grid of its positions."""
    blocks = {key.split(".")[1] for key in state if key.startswith("decoder.")}
    if "mask_token.0" in state:
        blocks = {key.split(".")[2] for key in state if key.startswith("decoder.0.")}
        return "unet", state["mask_token.0"].shape[-1], len(blocks), None
    width = state["mask_token"].shape[-1] if "mask_token" in state else None
    if "decoder_pos_embed" not in state:
        return "convnext", width, len(blocks), None
    regions = state["decoder_pos_embed"].shape[1]
    grid = grid_of(told.size, STRIDE) if told.size else squarest(regions)
    if grid[0] * grid[1] != regions:
        raise ValueError(f"{told.size[0]}x{told.size[1]} pixels are not its {regions} regions of {STRIDE}")
    return "vit", width, len(blocks), grid
