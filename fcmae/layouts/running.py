"""A state dict run as the code does that owns its layout, so that a conversion can be held against its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.layouts import FAMILIES, LAYOUTS, VIT_LAYOUTS, hf_models
from fcmae.layouts.convnext_spec import ConvNextSpec
from fcmae.layouts.hf_models import Outputs, hidden
from fcmae.layouts.sizes import Spec
from fcmae.layouts.timm import with_norm
from fcmae.layouts.vit_spec import VitSpec
from fcmae.models.layers import LAYER_SCALE


@torch.no_grad()
def outputs(layout: str, state: dict[str, Tensor], spec: Spec, images: Tensor) -> Outputs:
    """What the network of a state dict in `layout` makes of images (B, C, H, W), in float32 on the CPU.

    timm's and transformers' layouts run in timm and transformers, loaded strictly; the authors' through this toolkit's
    dense network, to which theirs was proven equal (tests/test_golden.py), and so does what timm has no model for.
    """
    state = {key: x.float() for key, x in state.items()}
    if layout in RUNNERS and spec.demands(False).keys() <= FAMILIES[spec.family][layout].holds:
        return RUNNERS[layout](state, spec, images)
    ours = FAMILIES[spec.family][layout].to_fcmae(state)
    return (_mae if isinstance(spec, VitSpec) else _fcmae)(ours, spec, images)


def moved_by_timm(ours: dict[str, Tensor], spec: VitSpec, size: tuple[int, int]) -> Callable[[Tensor], Outputs]:
    """What timm's model makes of images of another size, its positions resampled by itself. ours: without a decoder."""
    state = {key: x.float() for key, x in VIT_LAYOUTS["timm"].from_fcmae(ours).items()}
    model = timm_model(spec, state)
    model.load_state_dict(state, strict=True)
    model.set_input_size(img_size=size)
    return torch.no_grad()(partial(_timm_outputs, model, spec))


def timm_model(spec: Spec, state: dict[str, Tensor], **more) -> nn.Module:
    """timm's model that holds a state dict in its layout: the named one, where there is a name; more: for its class."""
    common = {"in_chans": spec.in_chans, "num_classes": spec.classes or 0, **more}
    if isinstance(spec, VitSpec):
        common |= {"img_size": spec.image_size, "num_heads": spec.running_heads}
        common["global_pool"] = "avg" if spec.fc_norm else "token"
    else:
        common["conv_mlp"] = state["stages.0.blocks.0.mlp.fc1.weight"].ndim == 4  # whoever made it chose
        v1 = spec.block_norm == "none"
        common |= {"use_grn": not v1, "ls_init_value": LAYER_SCALE if v1 else None}
    if spec.name is not None:
        return timm.create_model(spec.name, **common).eval()
    if isinstance(spec, VitSpec):
        sizes = {"patch_size": spec.patch_size, "embed_dim": spec.dim, "depth": spec.depth}
        return timm.models.VisionTransformer(**sizes, **common).eval()
    sizes = {"depths": spec.depths, "dims": spec.dims}
    return timm.models.convnext.ConvNeXt(**sizes, **common).eval()


def _fcmae(state: dict[str, Tensor], spec: ConvNextSpec, images: Tensor) -> Outputs:
    if spec.size not in (None, tuple(images.shape[-2:])):  # positions are the decoder's alone
        state = {key: x for key, x in state.items() if spec.part(key) != "decoder"}
        spec = replace(spec, decoder=None, decoder_kind="convnext", pca=None, size=None)
    model = spec.make(backend="reference").eval()
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
        mask.flatten(1)[:, ::2] = True
        made["predictions"] = model.predict(images, model.tiles(images, mask))
    return made


def _mae(state: dict[str, Tensor], spec: VitSpec, images: Tensor) -> Outputs:
    model = spec.make()
    own = model.state_dict() if not spec.decoder else {}
    if spec.fc_norm:
        model.norm = nn.Identity()
    decoder = {key: x for key, x in own.items() if spec.part(key) == "decoder"}
    model.load_state_dict({key: x for key, x in state.items() if spec.part(key) != "head"} | decoder, strict=True)
    tokens = model.eval().encode(images)
    made = {"features": tokens}
    if spec.decoder:
        made["predictions"] = model(images, hidden(spec, len(images)))[1]
    token = tokens[:, 0]
    if spec.fc_norm:
        token = F.layer_norm(
            tokens[:, 1:].mean(1), (spec.dim,), state["fc_norm.weight"], state["fc_norm.bias"], eps=1e-6
        )
        made["pooled"] = token
    if spec.classes:
        made["logits"] = F.linear(token, state["head.weight"], state["head.bias"])
    return made


def _timm(state: dict[str, Tensor], spec: Spec, images: Tensor) -> Outputs:
    model = timm_model(spec, state)
    model.load_state_dict(state, strict=True)
    return _timm_outputs(model, spec, images)


def _timm_outputs(model: nn.Module, spec: Spec, images: Tensor) -> Outputs:
    features = model.forward_features(images)
    made = {"features": features}
    if isinstance(spec, ConvNextSpec) or spec.fc_norm:
        made["pooled"] = model.forward_head(features, pre_logits=True)
    return made | ({"logits": model.forward_head(features)} if spec.classes else {})


def _hf(state: dict[str, Tensor], spec: Spec, images: Tensor) -> Outputs:
    if isinstance(spec, ConvNextSpec) and "layernorm.weight" not in state:  # a backbone's
        state = LAYOUTS["hf"].from_fcmae(with_norm(LAYOUTS["hf"].to_fcmae(state)))
    config, state = hf_models.config_of(spec), hf_models.file_keys(state, spec)
    model = hf_models.load(config.architectures[0], None, config=config, state_dict=state)
    return hf_models.outputs_of(model, spec, images)


RUNNERS: dict[str, Callable[[dict[str, Tensor], Spec, Tensor], Outputs]] = {"timm": _timm, "hf": _hf}
