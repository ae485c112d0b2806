"""Weights, gradients and optimizer state spread over the ranks (FSDP2), for models too large to repeat on every one.

A checkpoint stays what it is without: whole tensors in one file, written by rank 0. torch's own sharded format keeps
its index as a pickle, which this toolkit does not load.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def shard(model: nn.Module, device: torch.device, methods: tuple[str, ...] = ()) -> None:
    """Keep of every parameter this rank's part alone, in place; each block gathers its own while it computes.

    methods: the model's ways in besides `forward`. Every rank must hold the same values. An optimizer is made
    afterwards, over what `model.parameters()` is then.
    """
    # Nothing here writes into a block's output, which may be a view, in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for parent in model.modules():
        if isinstance(parent, nn.ModuleList):
            for block in parent:
                if not any(isinstance(child, nn.ModuleList) for child in block.modules()):
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in methods:
        register_fsdp_forward_method(model, method)


def local_count(model: nn.Module) -> int:
    """The number of parameters that this rank holds."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(part.numel() for part in parts)


@contextlib.contextmanager
def gradients_exchanged(forward: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether a backward pass in this block ends with the ranks' mean gradient, or adds up each rank's own."""
    model = getattr(forward, "_orig_mod", forward)  # of torch.compile's wrapper
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    without = forward.no_sync if isinstance(forward, DistributedDataParallel) and not wanted else contextlib.nullcontext
    with without():
        yield


def full(x: Tensor) -> Tensor:
    """A tensor, whole, on its device; where it is spread over the ranks, every rank must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole(value: Any) -> Any:
    """Tensors, in dicts and lists, that are spread over the ranks as whole ones on the CPU; all else as it is.

    Every rank must ask; rank 0 alone keeps them, the others have None in their place.
    """
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    if not isinstance(value, DTensor):
        return value
    gathered = full(value)
    return gathered.cpu() if torch.distributed.get_rank() == 0 else None


def spread_like(value: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, spread as `own` is; as it is if `own` is not, or of another shape."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def spread_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's state dict of whole tensors, spread as the parameters that this optimizer holds."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        index: {key: spread_like(x, parameters[index]) if isinstance(x, Tensor) else x for key, x in held.items()}
        for index, held in state["state"].items()
    }
    return {**state, "state": spread}
