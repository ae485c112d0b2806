"""One process or many: rank, device, and the few collectives training needs; from SLURM, torchrun or nothing."""

from __future__ import annotations

import datetime
import inspect
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fcmae import config as settings
from fcmae.errors import UsageError
from fcmae.train.agreement import check_alike, code_version
from fcmae.train.place import find_place

T = TypeVar("T")

# How long a process waits for the others. A dead one is noticed within seconds: by srun or torchrun, which end the
# others, or under submitit's local executor by the others (fcmae/launch.py). This is for one that hangs; longer than
# rank 0 takes for anything that the others wait for, such as indexing the shards of a large dataset.
PATIENCE = datetime.timedelta(minutes=30)


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
                outcome[1] = error if isinstance(error, UsageError) else UsageError(str(error))
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on every rank, done by rank 0 before the others, which then find its caches.

        A UsageError on any is raised on all.
        """
        made: list[T] = []
        self.on_main(lambda: made.append(work()))
        if self.size == 1:
            return made[0]
        error = None
        try:
            made = made or [work()]
        except (UsageError, OSError) as failed:
            error = str(failed)
        errors: list = [None] * self.size
        dist.all_gather_object(errors, error)
        for rank, text in enumerate(errors):
            if text is not None:
                raise UsageError(f"on rank {rank}, though not on rank 0: {text}")
        return made[0]


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
        if not count:
            why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
            raise UsageError(f"device={name} is not there: {why} on this machine; use device=auto or device=cpu")
        if index >= count:
            raise UsageError(f"device={name}: this machine has {count} CUDA devices, number {index} is not there")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device=mps: this machine has no MPS device; use device=auto")
    if device.type not in ("cpu", "mps"):
        raise UsageError(f"device={name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


@contextmanager
def joined(config: Any) -> Iterator[World]:
    """Among the processes that SLURM, torchrun or submitit started for this run, or alone, until the block ends.

    config: the whole configuration, with its `device`; all processes must hold the same, and the same code. They leave
    together. After an error none waits: the others may be in the middle of something, and the end of this process is
    what tells them. Raises UsageError when the processes differ.
    """
    place = find_place()
    # SLURM may show each task its own GPU only, as number 0.
    alone = place.launcher == "SLURM" and torch.cuda.device_count() == 1
    device = pick_device(config.device, 0 if alone else place.local_rank, place.size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if place.size == 1:
        yield World(0, 1, device)
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    cuda = device.type == "cuda"
    meeting = {"init_method": place.address, "rank": place.rank, "world_size": place.size} if place.address else {}
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE, device_id=device if cuda else None, **meeting)
    held: list = [None] * place.size
    dist.all_gather_object(held, (code_version(), settings.to_dict(config)))
    check_alike(held)
    yield World(place.rank, place.size, device)
    dist.barrier()  # a launcher takes the first that leaves for a sign to end the others
    dist.destroy_process_group()


def replicated(model: nn.Module) -> DistributedDataParallel:
    """The model with its gradients averaged over the ranks. Its buffers stay as they are: every rank has the same."""
    known = inspect.signature(DistributedDataParallel).parameters
    # The new name, from torch 2.13 on, for what torch then warns of under the old one.
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, **{name: False})


def _follow(launcher: int) -> None:
    """Tell this process to end, which saves first, when torchrun was killed: it cannot tell its processes any more."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
