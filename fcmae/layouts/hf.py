"""transformers' `ConvNextV2`, without the `convnextv2.` that its classifiers put before the encoder's names."""

from __future__ import annotations

from torch import Tensor

from fcmae.layouts.layout import Layout
from fcmae.layouts.names import Names

NAMES = Names(
    {
        "encoder.stem.0.{p}": "embeddings.patch_embeddings.{p}",
        "encoder.stem.1.{p}": "embeddings.layernorm.{p}",
        "encoder.stages.{s}.downsample.{i}.{p}": "encoder.stages.{s}.downsampling_layer.{i}.{p}",
        "encoder.stages.{s}.blocks.{b}.conv_dw.{p}": "encoder.stages.{s}.layers.{b}.dwconv.{p}",
        "encoder.stages.{s}.blocks.{b}.norm.{p}": "encoder.stages.{s}.layers.{b}.layernorm.{p}",
        "encoder.stages.{s}.blocks.{b}.mlp.fc1.{p}": "encoder.stages.{s}.layers.{b}.pwconv1.{p}",
        "encoder.stages.{s}.blocks.{b}.mlp.grn.{p}": "encoder.stages.{s}.layers.{b}.grn.{p}",
        "encoder.stages.{s}.blocks.{b}.mlp.fc2.{p}": "encoder.stages.{s}.layers.{b}.pwconv2.{p}",
        "norm.{p}": "layernorm.{p}",
        "head.{p}": "classifier.{p}",
    }
)


def _ours(key: str, x: Tensor) -> Tensor:
    return x.flatten() if ".grn." in key else x  # (1, 1, 1, C)


def _theirs(key: str, x: Tensor) -> Tensor:
    return x[None, None, None] if ".grn." in key else x


LAYOUT = Layout(
    "hf",
    "transformers' ConvNextV2",
    NAMES,
    marks=("embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.grn.weight"),
    ours=_ours,
    theirs=_theirs,
    holds=frozenset({"head"}),
    ends_in_norm=True,
)
