"""The authors' FCMAE pretraining checkpoint: its encoder in MinkowskiEngine's layout, its decoder dense."""

from __future__ import annotations

from torch import Tensor

from fcmae.layouts.dense import LICENCE
from fcmae.layouts.fcmae import DECODER
from fcmae.layouts.layout import Layout
from fcmae.layouts.minkowski import ENCODER, densified, sparsified
from fcmae.layouts.names import Names

DECODER_BLOCKS = {
    "decoder.{b}.conv_dw.{p}": "decoder.{b}.dwconv.{p}",
    "decoder.{b}.norm.{p}": "decoder.{b}.norm.{p}",
    "decoder.{b}.mlp.fc1.{p}": "decoder.{b}.pwconv1.{p}",
    "decoder.{b}.mlp.grn.weight": "decoder.{b}.grn.gamma",
    "decoder.{b}.mlp.grn.bias": "decoder.{b}.grn.beta",
    "decoder.{b}.mlp.fc2.{p}": "decoder.{b}.pwconv2.{p}",
}


def _ours(key: str, x: Tensor) -> Tensor:
    if key == "mask_token":  # (1, D, 1, 1)
        return x.movedim(1, -1).contiguous()
    if key in ("proj.weight", "pred.weight"):  # 1x1 convolutions
        return x.flatten(1)
    if key.startswith("decoder."):
        return x.flatten() if key.endswith((".gamma", ".beta")) else x  # (1, 1, 1, C)
    return densified(key, x)


def _theirs(key: str, x: Tensor) -> Tensor:
    if key == "mask_token":
        return x.movedim(-1, 1).contiguous()
    if key in ("proj.weight", "pred.weight"):
        return x[:, :, None, None]
    if key.startswith("decoder."):
        return x[None, None, None] if key.endswith((".gamma", ".beta")) else x
    return sparsified(key, x)


class OfficialLayout(Layout):
    """Shares its encoder's keys with the `minkowski` layout; its 1x1 convolutions tell it."""

    def recognises(self, state: dict[str, Tensor]) -> bool:
        return super().recognises(state) and state["proj.weight"].ndim == 4


LAYOUT = OfficialLayout(
    "official",
    "the authors' FCMAE pretraining",
    Names(ENCODER | {key: key for key in DECODER} | DECODER_BLOCKS),
    marks=("encoder.downsample_layers.1.1.kernel", "proj.weight"),
    ours=_ours,
    theirs=_theirs,
    holds=frozenset({"decoder"}),
    licence=LICENCE,
)
