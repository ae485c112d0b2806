"""A state dict run as the code does that owns its layout, so that a conversion can be held against its source."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.errors import UsageError
from fcmae.layouts import FAMILIES, LAYOUTS
from fcmae.layouts.spec import ConvNextSpec, Spec, VitSpec
from fcmae.layouts.timm import with_norm
from fcmae.models.fcmae import FCMAE
from fcmae.models.mae import MAE

# "features", of ConvNets (B, C, H/32, W/32), of ViTs (B, 1 + patches, D); and where the model has what they need
# "pooled" (B, D), after the norm; "logits" (B, classes); "prediction" (B, L, p*p*C), of a fixed mask.
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


def timm_model(spec: Spec, state: dict[str, Tensor]) -> nn.Module:
    """timm's model that holds a state dict in its layout: the named one, where there is a name."""
    common = {"in_chans": spec.in_chans, "num_classes": spec.classes or 0}
    if isinstance(spec, VitSpec):
        common["img_size"] = spec.image_size
    else:
        common["conv_mlp"] = state["stages.0.blocks.0.mlp.fc1.weight"].ndim == 4  # whoever made it chose
    if spec.name is not None:
        return timm.create_model(spec.name, **common).eval()
    if isinstance(spec, VitSpec):
        sizes = {"patch_size": spec.patch_size, "embed_dim": spec.dim, "depth": spec.depth, "num_heads": spec.heads}
        return timm.models.VisionTransformer(**sizes, **common).eval()
    sizes = {"depths": spec.depths, "dims": spec.dims, "use_grn": True, "ls_init_value": None}
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
    if "layernorm.weight" not in state:  # a backbone's
        state = LAYOUTS["hf"].from_fcmae(with_norm(LAYOUTS["hf"].to_fcmae(state)))
    with torch.device("meta"):
        model = (ConvNextV2ForImageClassification if spec.classes else ConvNextV2Model)(config)
    inner = "" if spec.classes is None else "convnextv2."
    own = {key if key.startswith("classifier.") else f"{inner}{key}": x for key, x in state.items()}
    model.load_state_dict(own, strict=True, assign=True)
    return model.eval()


def _fcmae(state: dict[str, Tensor], spec: ConvNextSpec, images: Tensor) -> Outputs:
    width, blocks = spec.decoder or (8, 0)
    model = FCMAE(
        tuple(images.shape[-2:]), spec.in_chans, spec.depths, spec.dims, decoder_dim=width, decoder_depth=blocks,
        backend="reference",
    )  # fmt: skip
    parts = {part: {k: x for k, x in state.items() if spec.part(k) == part} for part in ("encoder", "decoder")}
    decoder = parts["decoder"] or {k: x for k, x in model.state_dict().items() if spec.part(k) == "decoder"}
    model.load_state_dict(parts["encoder"] | decoder, strict=True)
    made = {"features": model.encode(images)}
    if spec.norm:
        norm = state["norm.weight"], state["norm.bias"]
        made["pooled"] = F.layer_norm(made["features"].mean((2, 3)), (spec.dims[-1],), *norm, eps=1e-6)
    if spec.classes:
        made["logits"] = F.linear(made["pooled"], state["head.weight"], state["head.bias"])
    if spec.decoder:
        mask = torch.zeros(images.shape[0], *model.grid(images), dtype=torch.bool)
        mask[:, ::2] = True
        made["prediction"] = model.predict(images, model.tiles(images, mask))
    return made


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
    model = timm_model(spec, state)
    model.load_state_dict(state, strict=True)
    features = model.forward_features(images)
    made = {"features": features, "pooled": model.forward_head(features, pre_logits=True)}
    return made | ({"logits": model.forward_head(features)} if spec.classes else {})


def _hf(state: dict[str, Tensor], spec: Spec, images: Tensor) -> Outputs:
    model = hf_model(spec, state)
    base = model.convnextv2 if spec.classes else model
    found = base(images)
    made = {"features": found.last_hidden_state, "pooled": found.pooler_output}
    return made | ({"logits": model(images).logits} if spec.classes else {})


RUNNERS: dict[str, Callable[[dict[str, Tensor], Spec, Tensor], Outputs]] = {"timm": _timm, "hf": _hf}
