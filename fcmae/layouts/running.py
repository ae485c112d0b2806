"""A state dict run as the code does that owns its layout, so that a conversion can be held against its source."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.layouts import LAYOUTS
from fcmae.layouts.spec import Spec
from fcmae.layouts.timm import CONV_MLP_DIMS
from fcmae.models.convnextv2 import ConvNeXtV2
from fcmae.models.support import DenseSupport

Outputs = dict[str, Tensor]  # "features" (B, C, H/32, W/32) and, with a classifier, "logits" (B, classes)


@torch.no_grad()
def outputs(layout: str, state: dict[str, Tensor], spec: Spec, images: Tensor) -> Outputs:
    """What the network of a state dict in `layout` makes of images (B, C, H, W), in float32 on the CPU.

    timm's and transformers' layouts run in timm and transformers, loaded strictly; the authors' through this toolkit's
    dense network, to which theirs was proven equal (tests/test_golden.py).
    """
    state = {key: x.float() for key, x in state.items()}
    return RUNNERS.get(layout, _ours)(LAYOUTS[layout].to_fcmae(state) if layout not in RUNNERS else state, spec, images)


def timm_model(spec: Spec) -> nn.Module:
    """timm's model of these sizes: the named one, where there is a name."""
    classes = spec.classes or 0
    if spec.name is not None:
        return timm.create_model(spec.name, in_chans=spec.in_chans, num_classes=classes).eval()
    sizes = {"in_chans": spec.in_chans, "depths": spec.depths, "dims": spec.dims, "num_classes": classes}
    small = spec.dims[0] in CONV_MLP_DIMS
    return timm.models.convnext.ConvNeXt(**sizes, conv_mlp=small, use_grn=True, ls_init_value=None).eval()


def hf_model(spec: Spec, state: dict[str, Tensor]) -> nn.Module:
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


def _ours(state: dict[str, Tensor], spec: Spec, images: Tensor) -> Outputs:
    encoder = ConvNeXtV2(spec.in_chans, spec.depths, spec.dims)
    encoder.load_state_dict({k.removeprefix("encoder."): x for k, x in state.items() if k.startswith("encoder.")})
    features = encoder(images, DenseSupport()).permute(0, 3, 1, 2)
    if spec.classes is None:
        return {"features": features}
    pooled = F.layer_norm(features.mean((2, 3)), (spec.dims[-1],), state["norm.weight"], state["norm.bias"], eps=1e-6)
    return {"features": features, "logits": F.linear(pooled, state["head.weight"], state["head.bias"])}


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
