"""Optimizer, precision and gradient norm."""

from __future__ import annotations

import contextlib

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from fcmae.schema import TrainConfig
from fcmae.train.sharding import full

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(model: nn.Module, train: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW whose weight decay spares biases, norms and GRN. Its state dict names the parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = [name for name in names.values() if name.endswith((".gamma", ".beta"))]  # GRN as (1, C), MinkowskiEngine's
    groups = param_groups_weight_decay(model, train.weight_decay, no_weight_decay_list=rows)
    for group in groups:
        group["params"] = [(names[parameter], parameter) for parameter in group["params"]]
    return adamw(groups, train, device)


def adamw(groups: list[dict], train: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over groups of named parameters, each with its own weight decay."""
    return torch.optim.AdamW(groups, lr=0.0, betas=tuple(train.betas), fused=device.type in ("cpu", "cuda"))


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context a forward pass runs in: nothing for fp32."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """The fp16 loss scaler; disabled, and then transparent, for other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`, times its own "lr_scale" where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def grad_norm(model: nn.Module) -> torch.Tensor:
    """The 2-norm of the gradient over all parameters, a scalar tensor. Where it is spread, every rank must ask."""
    return full(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def clip(model: nn.Module, largest: float | None, norm: torch.Tensor) -> None:
    """Scale the gradient, whose norm is `norm`, down to `largest` if it is longer; None: leave it."""
    if largest is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)


def running_statistics(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The buffers that a forward pass changes, which are BatchNorm's, and copies of them."""
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]


def first_nonfinite(model: nn.Module) -> str:
    """The name of the first parameter whose gradient has a NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not full(torch.isfinite(parameter.grad).all()):
            return name
    return "none: the loss alone"
