"""Which learning rate and which weight decay each parameter has (layer decay: arXiv 2003.10555 §3.1, 2106.08254)."""

from __future__ import annotations

import math

import torch
from torch import nn

from fcmae.downstream.settings import DownstreamTrain
from fcmae.errors import UsageError
from fcmae.layouts.convnext_spec import ConvNextSpec
from fcmae.layouts.sizes import Spec
from fcmae.train.optim import adamw

GROUP = 3  # blocks of stage 3 to a layer in the scheme `group`
# `group` is published for sizes of this stage-3 depth, base and large, but not for one as wide as huge (appendix A.2).
DEEP, WIDE = 27, 352


def scheme_of(spec: Spec, train: DownstreamTrain) -> str:
    """The scheme in use: as set, or as published for such sizes. Raises UsageError for groups of a ViT."""
    convnext = isinstance(spec, ConvNextSpec)
    if train.layer_decay_scheme == "group" and not convnext:
        raise UsageError("train.layer_decay_scheme=group is for ConvNets; a ViT decays per block")
    published = "group" if convnext and spec.depths[2] >= DEEP and spec.dims[0] < WIDE else "block"
    return train.layer_decay_scheme or published


def last_layer(spec: Spec, scheme: str) -> int:
    """The id of the classifier's layer; the first layer has 0."""
    if not isinstance(spec, ConvNextSpec):
        return spec.depth + 1
    return sum(spec.depths) + 1 if scheme == "block" else 4 + math.ceil(spec.depths[2] / GROUP)


def layer_of(name: str, spec: Spec, scheme: str) -> int:
    """The layer of a parameter of timm's model.

    ViT: embeddings 0, block i has i + 1, what follows the blocks is last, as MAE's `lr_decay`. ConvNet, `block`: blocks
    before it + 1, a downsampling (the stem too) as the block it opens, as ConvNeXt V2's code for its small models;
    `group`: stem 0, stage 1 and 2 have 1 and 2, three blocks of stage 3 each one more, stage 4 the next; the
    downsamplings before stages 2, 3, 4 have 2, 3 and stage 4's.
    """
    parts = name.split(".")
    if not isinstance(spec, ConvNextSpec):
        if parts[0] in ("cls_token", "pos_embed", "patch_embed"):
            return 0
        return int(parts[1]) + 1 if parts[0] == "blocks" else last_layer(spec, scheme)
    if parts[0] == "stem":
        return 1 if scheme == "block" else 0
    if parts[0] != "stages":
        return last_layer(spec, scheme)
    stage, opens = int(parts[1]), parts[2] == "downsample"
    block = 0 if opens else int(parts[3])
    if scheme == "block":
        return sum(spec.depths[:stage]) + block + 1
    return {0: 1, 1: 2, 2: 3 + block // GROUP, 3: last_layer(spec, scheme) - 1}[stage]


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay pulls at a parameter: not at biases, norms and GRN, nor at class token and positions."""
    if name in ("cls_token", "pos_embed") or ".grn." in name or name.endswith(".bias"):
        return False
    return parameter.ndim > 1


def make_groups(model: nn.Module, spec: Spec, train: DownstreamTrain) -> list[dict]:
    """Groups of named parameters that are trained, in the model's order, with "lr_scale", "weight_decay", "layer"."""
    scheme = scheme_of(spec, train)
    last, decay = last_layer(spec, scheme), train.layer_decay or 1.0
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decaying = layer_of(name, spec, scheme), decays(name, parameter)
        group = groups.setdefault(
            (layer, decaying),
            {
                "params": [],
                "weight_decay": train.weight_decay if decaying else 0.0,
                "lr_scale": decay ** (last - layer),
                "layer": layer,
            },
        )
        group["params"].append((name, parameter))
    return [groups[key] for key in sorted(groups)]


def make_optimizer(groups: list[dict], train: DownstreamTrain, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, or LARS with momentum 0.9 that adapts weights and leaves biases and norms alone (arXiv 1708.03888)."""
    groups = [dict(group) for group in groups]  # torch writes into them
    if train.optimizer == "adamw":
        return adamw(groups, train, device)
    from timm.optim import Lars

    # timm adapts only what decays unless told so; linear probing has no decay at all.
    adapted = [{**g, "always_adapt": any(decays(name, p) for name, p in g["params"])} for g in groups]
    return Lars(adapted, lr=0.0, momentum=0.9)


def describe(groups: list[dict]) -> str:
    """One line a group: layer, learning-rate scale, weight decay, the names of its parameters."""
    lines = ["layer  lr scale      weight decay  parameters"]
    for g in groups:
        names = " ".join(name for name, _ in g["params"])
        lines.append(f"{g['layer']:>5}  {g['lr_scale']:<12.6g}  {g['weight_decay']:<12g}  {names}")
    return "\n".join(lines) + "\n"
