"""This toolkit's own layout, and the rows that others share with it."""

from __future__ import annotations

from fcmae.layouts.layout import Layout
from fcmae.layouts.names import Names

# The published decoder, its variants, and the classifier of a fine-tuned encoder.
DECODER = ("proj.{p}", "mask_token", "pred.{p}")
DECODER_BLOCKS = (
    "decoder.{b}.conv_dw.{p}",
    "decoder.{b}.norm.{p}",
    "decoder.{b}.mlp.{m}.{p}",
)
VIT_DECODER = (
    "decoder_pos_embed",
    "decoder.{b}.{m}.{p}",
    "decoder.{b}.{m}.{n}.{p}",
    "decoder_norm.{p}",
)
UNET_DECODER = (
    "proj.{i}.{p}",
    "mask_token.{i}",
    "up.{i}.{p}",
    "decoder.{i}.{b}.conv_dw.{p}",
    "decoder.{i}.{b}.norm.{p}",
    "decoder.{i}.{b}.mlp.{m}.{p}",
    "decoder.{i}.{b}.gamma",
)
TARGET = ("target.{p}",)
HEAD = ("norm.{p}", "head.{p}")
ENCODER = (
    "encoder.stem.{i}.{p}",
    "encoder.stages.{s}.downsample.{i}.{p}",
    "encoder.stages.{s}.blocks.{b}.conv_dw.{p}",
    "encoder.stages.{s}.blocks.{b}.norm.{p}",
    "encoder.stages.{s}.blocks.{b}.mlp.{m}.{p}",
    "encoder.stages.{s}.blocks.{b}.gamma",
)

LAYOUT = Layout(
    "fcmae",
    "this toolkit",
    Names(
        {
            key: key
            for key in (
                *(*ENCODER, *DECODER, *DECODER_BLOCKS, "decoder.{b}.gamma"),
                *(*VIT_DECODER, *UNET_DECODER, *TARGET, *HEAD),
            )
        }
    ),
    marks=("encoder.stem.0.weight", "encoder.stages.0.blocks.0.conv_dw.weight"),
    holds=frozenset({"decoder", "head", "layer_scale", "norms", "variants", "skips"}),
)
