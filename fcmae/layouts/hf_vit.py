"""transformers' `ViT` and `ViTMAE`, without the `vit.` that their larger classes put before the encoder's names."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from fcmae.layouts.layout import Layout
from fcmae.layouts.names import Names

# A block's modules: ours (the parts of `qkv` by their letters), in files, and as transformers 5 has them in memory.
BLOCK = (
    ("norm1", "layernorm_before", "layernorm_before"),
    ("attn.q", "attention.attention.query", "attention.q_proj"),
    ("attn.k", "attention.attention.key", "attention.k_proj"),
    ("attn.v", "attention.attention.value", "attention.v_proj"),
    ("attn.proj", "attention.output.dense", "attention.o_proj"),
    ("norm2", "layernorm_after", "layernorm_after"),
    ("mlp.fc1", "intermediate.dense", "mlp.fc1"),
    ("mlp.fc2", "output.dense", "mlp.fc2"),
)
# transformers 4 and 5 read these names and the hub's files have them; transformers 5 saves `ViTMAEForPreTraining` with
# other names of the decoder, and calls modules otherwise than files.
NAMES = Names(
    {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.{p}": "embeddings.patch_embeddings.projection.{p}",
        **{f"blocks.{{b}}.{our}.{{p}}": f"encoder.layer.{{b}}.{file}.{{p}}" for our, file, _ in BLOCK},
        "norm.{p}": "layernorm.{p}",
        "mask_token": "decoder.mask_token",
        "decoder_pos_embed": "decoder.decoder_pos_embed",
        "decoder_embed.{p}": "decoder.decoder_embed.{p}",
        **{f"decoder_blocks.{{b}}.{our}.{{p}}": f"decoder.decoder_layers.{{b}}.{file}.{{p}}" for our, file, _ in BLOCK},
        "decoder_norm.{p}": "decoder.decoder_norm.{p}",
        "decoder_pred.{p}": "decoder.decoder_pred.{p}",
        "head.{p}": "classifier.{p}",
    },
    also={
        template.format(module): f"{blocks}.{{b}}.{our}.{{p}}"
        for our, file, memory in BLOCK
        for blocks, template, module in (
            ("blocks", "layers.{{b}}.{}.{{p}}", memory),
            ("decoder_blocks", "decoder.decoder_layers.{{b}}.{}.{{p}}", memory),
            ("decoder_blocks", "decoder.decoder_encoder.layer.{{b}}.{}.{{p}}", file),
        )
    },
)
_JOINED = re.compile(r"(.*\.attn\.)qkv(\..*)")
_PART = re.compile(r"(.*\.attn\.)[qkv](\..*)")


def _split(key: str) -> list[str]:
    """The names of the three parts of one of our keys; none where it is of one piece."""
    match = _JOINED.fullmatch(key)
    return [f"{match[1]}{part}{match[2]}" for part in "qkv"] if match else []


class HfVitLayout(Layout):
    """Queries, keys and values are three tensors (D, D) here, one (3D, D) in that order in this toolkit and timm."""

    def whole(self, key: str) -> str:
        return _PART.sub(r"\1qkv\2", super().whole(key))

    def parts(self, key: str) -> tuple[str, ...]:
        return tuple(super(HfVitLayout, self).parts(part)[0] for part in _split(key) or [key])

    def to_fcmae(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        apart, made = super().to_fcmae(state), {}
        for key, x in apart.items():
            joined = _PART.sub(r"\1qkv\2", key)
            pieces = [apart[part] for part in _split(joined) if part in apart] if joined != key else []
            if len(pieces) < 3 or len({piece.shape[1:] for piece in pieces}) > 1:
                made[key] = x  # of one piece, or without its fellows, for which it is refused by name
            elif joined not in made:
                made[joined] = torch.cat(pieces)
        return made

    def from_fcmae(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        apart = {}
        for key, x in state.items():
            parts = _split(key)
            apart |= dict(zip(parts, x.chunk(3), strict=True)) if parts else {key: x}
        return super().from_fcmae(apart)


LAYOUT = HfVitLayout(
    "hf",
    "transformers' ViT and ViTMAE",
    NAMES,
    marks=("embeddings.cls_token", "embeddings.patch_embeddings.projection.weight"),
    holds=frozenset({"decoder", "head"}),
    family="vit",
)
