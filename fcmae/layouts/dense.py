"""The authors' dense ConvNeXt V2 (`models/convnextv2.py` of their repository): fine-tuned and downloadable files."""

from __future__ import annotations

from torch import Tensor

from fcmae.layouts.layout import Layout
from fcmae.layouts.names import Names

LICENCE = "the authors' published ConvNeXt V2 weights are under CC BY-NC 4.0: not for commercial use"

NAMES = Names(
    {
        "encoder.stem.{i}.{p}": "downsample_layers.0.{i}.{p}",
        "encoder.stages.{s}.downsample.{i}.{p}": "downsample_layers.{s}.{i}.{p}",
        "encoder.stages.{s}.blocks.{b}.conv_dw.{p}": "stages.{s}.{b}.dwconv.{p}",
        "encoder.stages.{s}.blocks.{b}.norm.{p}": "stages.{s}.{b}.norm.{p}",
        "encoder.stages.{s}.blocks.{b}.mlp.fc1.{p}": "stages.{s}.{b}.pwconv1.{p}",
        "encoder.stages.{s}.blocks.{b}.mlp.grn.weight": "stages.{s}.{b}.grn.gamma",
        "encoder.stages.{s}.blocks.{b}.mlp.grn.bias": "stages.{s}.{b}.grn.beta",
        "encoder.stages.{s}.blocks.{b}.mlp.fc2.{p}": "stages.{s}.{b}.pwconv2.{p}",
        "norm.{p}": "norm.{p}",
        "head.{p}": "head.{p}",
    }
)


def _ours(key: str, x: Tensor) -> Tensor:
    return x.flatten() if key.endswith((".gamma", ".beta")) else x  # (1, 1, 1, C)


def _theirs(key: str, x: Tensor) -> Tensor:
    return x[None, None, None] if key.endswith((".gamma", ".beta")) else x


LAYOUT = Layout(
    "dense",
    "the authors' dense ConvNeXt V2",
    NAMES,
    marks=("downsample_layers.0.0.weight", "stages.0.0.grn.gamma"),
    ours=_ours,
    theirs=_theirs,
    holds=frozenset({"head"}),
    licence=LICENCE,
)
