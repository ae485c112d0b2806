"""This toolkit's own layout, and the rows that others share with it."""

from __future__ import annotations

from fcmae.layouts.layout import Layout
from fcmae.layouts.names import Names

# Decoder, and the classifier of a fine-tuned encoder.
DECODER = ("proj.{p}", "mask_token", "pred.{p}")
DECODER_BLOCKS = (
    "decoder.{b}.conv_dw.{p}",
    "decoder.{b}.norm.{p}",
    "decoder.{b}.mlp.{m}.{p}",
)
HEAD = ("norm.{p}", "head.{p}")
ENCODER = (
    "encoder.stem.{i}.{p}",
    "encoder.stages.{s}.downsample.{i}.{p}",
    "encoder.stages.{s}.blocks.{b}.conv_dw.{p}",
    "encoder.stages.{s}.blocks.{b}.norm.{p}",
    "encoder.stages.{s}.blocks.{b}.mlp.{m}.{p}",
)

LAYOUT = Layout(
    "fcmae",
    "this toolkit",
    Names({key: key for key in (*ENCODER, *DECODER, *DECODER_BLOCKS, *HEAD)}),
    marks=("encoder.stem.0.weight", "encoder.stages.0.blocks.0.conv_dw.weight"),
    holds=frozenset({"decoder", "head"}),
)
