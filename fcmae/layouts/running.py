"""A state dict run as the code does that owns its layout, so that a conversion can be held against its source."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.layouts import FAMILIES, VIT_LAYOUTS, hf_models
from fcmae.layouts.hf_models import RATIO, Outputs, hidden
from fcmae.layouts.spec import ConvNextSpec, Spec, VitSpec
from fcmae.layouts.timm import CONV_MLP_DIMS
from fcmae.models.convnextv2 import ConvNeXtV2
from fcmae.models.mae import MAE
from fcmae.models.support import DenseSupport


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


def moved_by_timm(ours: dict[str, Tensor], spec: VitSpec, size: tuple[int, int]) -> Callable[[Tensor], Outputs]:
    """What timm's model makes of images of another size, its positions resampled by itself. ours: without a decoder."""
    model = timm_model(spec)
    model.load_state_dict({key: x.float() for key, x in VIT_LAYOUTS["timm"].from_fcmae(ours).items()}, strict=True)
    model.set_input_size(img_size=size)
    return torch.no_grad()(partial(_timm_outputs, model, spec))


def timm_model(spec: Spec) -> nn.Module:
    """timm's model of these sizes: the named one, where there is a name."""
    common = {"in_chans": spec.in_chans, "num_classes": spec.classes or 0}
    if isinstance(spec, VitSpec):
        common |= {"img_size": spec.image_size, "num_heads": spec.running_heads}
        common["global_pool"] = "avg" if spec.fc_norm else "token"
    if spec.name is not None:
        return timm.create_model(spec.name, **common).eval()
    if isinstance(spec, VitSpec):
        sizes = {"patch_size": spec.patch_size, "embed_dim": spec.dim, "depth": spec.depth}
        return timm.models.VisionTransformer(**sizes, **common).eval()
    small = spec.dims[0] in CONV_MLP_DIMS
    sizes = {"depths": spec.depths, "dims": spec.dims, "conv_mlp": small, "use_grn": True, "ls_init_value": None}
    return timm.models.convnext.ConvNeXt(**sizes, **common).eval()


def _fcmae(state: dict[str, Tensor], spec: ConvNextSpec, images: Tensor) -> Outputs:
    encoder = ConvNeXtV2(spec.in_chans, spec.depths, spec.dims)
    encoder.load_state_dict({k.removeprefix("encoder."): x for k, x in state.items() if k.startswith("encoder.")})
    features = encoder(images, DenseSupport()).permute(0, 3, 1, 2)
    if spec.classes is None:
        return {"features": features}
    pooled = F.layer_norm(features.mean((2, 3)), (spec.dims[-1],), state["norm.weight"], state["norm.bias"], eps=1e-6)
    return {"features": features, "logits": F.linear(pooled, state["head.weight"], state["head.bias"])}


def _mae(state: dict[str, Tensor], spec: VitSpec, images: Tensor) -> Outputs:
    width, blocks = spec.decoder or (4, 0)
    model = MAE(
        spec.image_size, spec.in_chans, spec.patch_size, dim=spec.dim, depth=spec.depth, heads=spec.running_heads,
        decoder_dim=width, decoder_depth=blocks, decoder_heads=spec.running_decoder_heads, mask_ratio=RATIO,
    )  # fmt: skip
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
    model = timm_model(spec)
    model.load_state_dict(state, strict=True)
    return _timm_outputs(model, spec, images)


def _timm_outputs(model: nn.Module, spec: Spec, images: Tensor) -> Outputs:
    features = model.forward_features(images)
    made = {"features": features}
    if isinstance(spec, VitSpec) and spec.fc_norm:
        made["pooled"] = model.forward_head(features, pre_logits=True)
    return made | ({"logits": model.forward_head(features)} if spec.classes else {})


def _hf(state: dict[str, Tensor], spec: Spec, images: Tensor) -> Outputs:
    config, state = hf_models.config_of(spec), hf_models.file_keys(state, spec)
    model = hf_models.load(config.architectures[0], None, config=config, state_dict=state)
    return hf_models.outputs_of(model, spec, images)


RUNNERS: dict[str, Callable[[dict[str, Tensor], Spec, Tensor], Outputs]] = {"timm": _timm, "hf": _hf}
