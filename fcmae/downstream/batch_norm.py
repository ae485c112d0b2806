"""The BatchNorm without affine that linear probing puts before its classifier (arXiv 2111.06377 appendix A.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fcmae.train.distributed import World


def normalize_features(model: nn.Module) -> None:
    """BatchNorm without affine before the classifier, as linear probing has it (arXiv 2111.06377 appendix A.1)."""
    head = model.get_classifier()
    norm = nn.BatchNorm1d(head.in_features, affine=False, eps=1e-6, device=head.weight.device)
    owner = model.head if hasattr(model.head, "fc") else model
    setattr(owner, "fc" if owner is not model else "head", nn.Sequential(norm, head))


@torch.no_grad()
def average_statistics(model: nn.Module, world: World) -> None:
    """The same BatchNorm statistics on all ranks, their mean."""
    if world.size > 1:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                world.mean(module.running_mean)
                world.mean(module.running_var)


def plain(model: nn.Module) -> dict[str, Tensor]:
    """timm's state dict of a model, a BatchNorm before the classifier folded into it."""
    state, head = dict(model.state_dict()), model.get_classifier()
    if not isinstance(head, nn.Sequential):
        return state
    [prefix] = [name for name, module in model.named_modules() if module is head]
    norm, linear = head
    state = {key: x for key, x in state.items() if not key.startswith(f"{prefix}.")}
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    weight = linear.weight.double() * scale
    state[f"{prefix}.weight"] = weight.float()
    state[f"{prefix}.bias"] = (linear.bias.double() - weight @ norm.running_mean.double()).float()
    return state
