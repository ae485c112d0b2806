"""The training loop: gradient accumulation, the guard against non-finite steps, checkpoints, leaving on a signal."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fcmae.errors import UsageError
from fcmae.kernels.tiles import Tiles
from fcmae.train import nonfinite, optim
from fcmae.train.distributed import World
from fcmae.train.log import Log
from fcmae.train.run_config import RunConfig
from fcmae.train.schedule import Schedule
from fcmae.train.sharding import gradients_exchanged
from fcmae.train.state import Progress, TrainState


@dataclass(frozen=True)
class Hooks:
    """What the loop asks of its run, on every rank.

    loss: of a batch of the loader, a scalar to take the gradient of; runs under autocast. save: write a checkpoint.
    pause: draw a picture, validate; `every` so many epochs and at the end, before the checkpoint. name_of: an image by
    index. begin: called with the number of a step, counted from 0, before its batches. guard: called with the loss of a
    step before the optimizer makes it, and may raise. stepped: the optimizer changed the weights.
    """

    loss: Callable[[dict], torch.Tensor]
    save: Callable[[], None]
    pause: Callable[[], None]
    every: float
    name_of: Callable[[int], str]
    begin: Callable[[int], None] = lambda step: None
    guard: Callable[[float], None] = lambda loss: None
    stepped: Callable[[], None] = lambda: None


# Of people and systems, and of SLURM ahead of a time limit or a preemption.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 or SIGUSR2, remembered until the step is done. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict = {}

    def __enter__(self) -> StopSignal:
        for number in STOPPING:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def to_end(steps: Generator[Progress, None, int], stop: StopSignal) -> int:
    """Run a run step by step to its end: its exit status. Signals count from where everything is ready."""
    try:
        next(steps)
        with stop:
            while True:
                next(steps)
    except StopIteration as end:
        return end.value


def train(
    state: TrainState,
    forward: nn.Module,
    loader: Iterable[dict],
    schedule: Schedule,
    config: RunConfig,
    world: World,
    log: Log,
    hooks: Hooks,
    stop: StopSignal,
    in_turn: bool = False,
) -> Generator[Progress, None, int]:
    """Train from `state.progress` to the end of `schedule`, one step for each value asked for, which is the progress.

    Returns 0, or the number of the signal that ended it early. What happens between two steps is not in its seconds.
    forward: the state's model, compiled or wrapped for several ranks, as `hooks.loss` runs it. loader: what that takes,
    dicts with "index" (B,) int64 and "bad", names of unreadable images that were replaced, among other things. in_turn:
    it is one of several runs whose steps are timed, and which may use the device in between.
    Raises UsageError when steps stay non-finite or too many images are unreadable; the last checkpoint then stands.
    """
    optimizer, scaler, progress = state.optimizer, state.scaler, state.progress
    state.model.train()
    batches = iter(loader)
    mark = time.perf_counter()
    while not schedule.is_over(progress.step, progress.seconds):
        lr = schedule.lr_at(progress.step, progress.seconds)
        optim.set_lr(optimizer, lr)
        begun = time.perf_counter()
        hooks.begin(progress.step)
        paused = time.perf_counter() - begun if world.is_main else 0.0  # and so long do the others wait
        optimizer.zero_grad(set_to_none=True)
        statistics = optim.running_statistics(state.model)
        parts: list[torch.Tensor] = []
        waited, bad, indices = 0.0, [], []
        for i in range(schedule.accum_steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            bad += batch["bad"]
            indices.append(batch["index"].tolist())
            with gradients_exchanged(forward, i == schedule.accum_steps - 1):
                with optim.autocast(world.device, config.train.precision):
                    part = hooks.loss(batch) / schedule.accum_steps
                scaler.scale(part).backward()
            parts.append(part.detach())
        scaler.unscale_(optimizer)
        loss, grad_norm = torch.stack(parts).sum(), optim.grad_norm(state.model)
        # One collective and one host synchronisation a step, and all ranks decide alike.
        now = time.perf_counter()
        others = [loss.new_full((), value) for value in (stop.received, len(bad), now - mark, paused)]
        mark = now
        means = world.mean(torch.stack([loss, grad_norm, *others])).tolist()
        mean_loss, norm, stopping, mean_bad, seconds, paused = means
        seconds -= paused * world.size
        finite = math.isfinite(norm) and math.isfinite(mean_loss)
        if mean_bad:
            log.bad_images(world.gathered(bad))
        if finite:
            hooks.guard(mean_loss)
            optim.clip(state.model, config.train.clip_grad, grad_norm)
            scaler.step(optimizer)
            hooks.stepped()
        scaler.update()
        progress.step += 1
        progress.seconds += seconds
        progress.bad_images += round(mean_bad * world.size)
        row = {
            "step": progress.step,
            "epoch": round(schedule.epoch_at(progress.step), 6),
            "images": progress.step * schedule.effective_batch,
            "loss": mean_loss if math.isfinite(mean_loss) else None,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
        }
        if progress.rollbacks:
            row["rollbacks"] = progress.rollbacks
        if scaler.is_enabled():
            row["loss_scale"] = scaler.get_scale()
        if not finite:
            row["skipped"] = True
        log.step(row, seconds, progress.seconds, waited)
        if finite:
            progress.skipped_in_a_row = 0
        else:
            for buffer, value in statistics:
                buffer.copy_(value)
            overflow = scaler.is_enabled() and row["loss"] is not None
            names = [hooks.name_of(i) for i in nonfinite.suspects(parts, indices)]
            nonfinite.note_skipped(state, overflow, names, config.train.max_nonfinite, log, world)
        check_bad_share(progress.bad_images, row["images"], config.data.max_bad_share)
        if in_turn and world.device.type == "cuda":
            torch.cuda.synchronize(world.device)  # the optimizer's work is this run's time
        done, paused = schedule.is_over(progress.step, progress.seconds), time.perf_counter()
        if done or crossed(schedule, progress.step, hooks.every):
            hooks.pause()  # before the checkpoint: a run killed in between draws it again
        if done or stopping or progress.step % config.checkpoint.every == 0:
            hooks.save()
        if stopping and not done:
            return stop.received or signal.SIGTERM
        yield progress
        mark += time.perf_counter() - paused
    return 0


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A loader's tensor on the device, on CUDA without waiting; elsewhere torch may read a source already freed."""
    return x.to(device, non_blocking=device.type == "cuda")


def tiles_of(mask: torch.Tensor) -> Tiles:
    """The tables of a loader's mask (B, gh, gw), on the CPU, where reading the visible count waits for nothing."""
    return Tiles.from_mask(mask, int((~mask[0]).sum()))


def crossed(schedule: Schedule, step: int, every: float) -> bool:
    """Whether step number `step`, counted from 1, completed a multiple of `every` epochs."""
    return schedule.epoch_at(step) // every > schedule.epoch_at(step - 1) // every


def check_bad_share(bad: int, read: int, largest: float) -> None:
    """Raises UsageError when more than the share `largest` of the images read (of 1,000 at least) was unreadable."""
    if bad > largest * max(read, 1000):
        raise UsageError(
            f"{bad} of {read} images read were unreadable, more than data.max_bad_share={largest:g}; "
            f"bad_images.txt in the run folder names them"
        )
