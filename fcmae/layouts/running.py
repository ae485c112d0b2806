"""A state dict run as the code does that owns its layout, so that a conversion can be held against its source."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.layouts import FAMILIES
from fcmae.layouts.spec import ConvNextSpec, Spec, VitSpec
from fcmae.layouts.timm import CONV_MLP_DIMS
from fcmae.models.convnextv2 import ConvNeXtV2
from fcmae.models.mae import MAE
from fcmae.models.support import DenseSupport

# "features", of ConvNets (B, C, H/32, W/32), of ViTs (B, 1 + patches, D), and with a classifier "logits" (B, classes).
Outputs = dict[str, Tensor]


@torch.no_grad()
def outputs(layout: str, state: dict[str, Tensor], spec: Spec, images: Tensor) -> Outputs:
    """What the network of a state dict in `layout` makes of images (B, C, H, W), in float32 on the CPU.

    timm's and transformers' layouts run in timm and transformers, loaded strictly; the authors' through this toolkit's
    dense network, to which theirs was proven equal (tests/test_golden.py).
    """
    state = {key: x.float() for key, x in state.items()}
    if layout in RUNNERS:
        return RUNNERS[layout](state, spec, images)
    ours = FAMILIES[spec.family][layout].to_fcmae(state)
    return (_mae if isinstance(spec, VitSpec) else _fcmae)(ours, spec, images)


def timm_model(spec: Spec) -> nn.Module:
    """timm's model of these sizes: the named one, where there is a name."""
    common = {"in_chans": spec.in_chans, "num_classes": spec.classes or 0}
    if isinstance(spec, VitSpec):
        common["img_size"] = spec.image_size
    if spec.name is not None:
        return timm.create_model(spec.name, **common).eval()
    if isinstance(spec, VitSpec):
        sizes = {"patch_size": spec.patch_size, "embed_dim": spec.dim, "depth": spec.depth, "num_heads": spec.heads}
        return timm.models.VisionTransformer(**sizes, **common).eval()
    small = spec.dims[0] in CONV_MLP_DIMS
    sizes = {"depths": spec.depths, "dims": spec.dims, "conv_mlp": small, "use_grn": True, "ls_init_value": None}
    return timm.models.convnext.ConvNeXt(**sizes, **common).eval()


def hf_model(spec: ConvNextSpec, state: dict[str, Tensor]) -> nn.Module:
    """transformers' model that holds a state dict in its layout: a classifier where there is one, else the encoder."""
    try:
        from transformers import ConvNextV2Config, ConvNextV2ForImageClassification, ConvNextV2Model
    except ImportError:
        raise UsageError("transformers is not installed: pip install transformers, or fcmae[hf]") from None
    # transformers' own final norm has another eps than the authors' and timm's, unless told.
    sizes = {"num_channels": spec.in_chans, "depths": list(spec.depths), "hidden_sizes": list(spec.dims)}
    labels = {"num_labels": spec.classes} if spec.classes else {}
    config = ConvNextV2Config(**sizes, layer_norm_eps=1e-6, **labels)
    with torch.device("meta"):
        model = (ConvNextV2ForImageClassification if spec.classes else ConvNextV2Model)(config)
    inner = "" if spec.classes is None else "convnextv2."
    own = {key if key.startswith("classifier.") else f"{inner}{key}": x for key, x in state.items()}
    model.load_state_dict(own, strict=True, assign=True)
    return model.eval()


def _fcmae(state: dict[str, Tensor], spec: ConvNextSpec, images: Tensor) -> Outputs:
    encoder = ConvNeXtV2(spec.in_chans, spec.depths, spec.dims)
    encoder.load_state_dict({k.removeprefix("encoder."): x for k, x in state.items() if k.startswith("encoder.")})
    features = encoder(images, DenseSupport()).permute(0, 3, 1, 2)
    if spec.classes is None:
        return {"features": features}
    pooled = F.layer_norm(features.mean((2, 3)), (spec.dims[-1],), state["norm.weight"], state["norm.bias"], eps=1e-6)
    return {"features": features, "logits": F.linear(pooled, state["head.weight"], state["head.bias"])}


def _mae(state: dict[str, Tensor], spec: VitSpec, images: Tensor) -> Outputs:
    model = MAE(
        spec.image_size, spec.in_chans, spec.patch_size, dim=spec.dim, depth=spec.depth, heads=spec.heads,
        decoder_dim=4, decoder_depth=0, decoder_heads=1,
    )  # fmt: skip
    decoder = {key: x for key, x in model.state_dict().items() if spec.part(key) == "decoder"}
    model.load_state_dict({key: x for key, x in state.items() if spec.part(key) == "encoder"} | decoder, strict=True)
    tokens = model.eval().encode(images)
    if spec.classes is None:
        return {"features": tokens}
    return {"features": tokens, "logits": F.linear(tokens[:, 0], state["head.weight"], state["head.bias"])}


def _timm(state: dict[str, Tensor], spec: Spec, images: Tensor) -> Outputs:
    model = timm_model(spec)
    model.load_state_dict(state, strict=True)
    features = model.forward_features(images)
    return {"features": features} | ({"logits": model.forward_head(features)} if spec.classes else {})


def _hf(state: dict[str, Tensor], spec: Spec, images: Tensor) -> Outputs:
    model = hf_model(spec, state)
    base = model.convnextv2 if spec.classes else model
    made = {"features": base(images).last_hidden_state}
    return made | ({"logits": model(images).logits} if spec.classes else {})


RUNNERS: dict[str, Callable[[dict[str, Tensor], Spec, Tensor], Outputs]] = {"timm": _timm, "hf": _hf}
