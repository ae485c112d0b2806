"""One process or many: rank, device, and the few collectives training needs. Reads torchrun's environment variables."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from fcmae.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all of the run: `rank` of `size`, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and prints."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all ranks."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, values: list) -> list:
        """The lists of all ranks, one after another, on every rank. Plain data, or tensors on the CPU."""
        if self.size == 1:
            return values
        parts: list = [None] * self.size
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank. A UsageError there is raised on all, so that none waits."""
        outcome: list = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except (UsageError, OSError) as error:
                outcome[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UsageError(outcome[1])
        return outcome[0]

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on every rank, done by rank 0 before the others, which then find its caches."""
        made: list[T] = []
        self.on_main(lambda: made.append(work()))
        return made[0] if made else work()


def pick_device(name: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device `auto`, `cpu`, `cuda`, `cuda:N` or `mps` stands for. Raises UsageError if this machine has none."""
    if name == "auto":
        mps = torch.backends.mps.is_available() and world_size == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r} is not a device; use auto, cpu, cuda, cuda:N or mps") from None
    if world_size > 1 and (device.type == "mps" or device.index is not None):
        raise UsageError(f"device={name} serves one process, not {world_size}; use device=cuda or cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise UsageError(f"device={name}: this machine has {count} CUDA devices, number {index} is not there")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device=mps: this machine has no MPS device; use device=auto")
    if device.type not in ("cpu", "mps"):
        raise UsageError(f"device={name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def start(device_name: str) -> World:
    """Join the run that torchrun started, or be the only process. Call `stop` at the end."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name, int(os.environ.get("LOCAL_RANK", 0)), size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or size == 1:
        return World(0, 1, device)
    cuda = device.type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return World(dist.get_rank(), dist.get_world_size(), device)


def stop(world: World) -> None:
    """Leave the process group."""
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()
