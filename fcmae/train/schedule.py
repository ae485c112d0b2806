"""What a configuration comes to: batch, steps and learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fcmae.errors import UsageError
from fcmae.schema import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """Resolved numbers of a run. Steps are optimizer steps; an epoch is `dataset_size` images.

    A run ends after `steps`, or, where that is None, after `seconds` of training.
    """

    dataset_size: int
    batch_size: int  # images per process and forward pass
    accum_steps: int
    effective_batch: int
    steps: int | None
    warmup_epochs: float
    epochs: float
    peak_lr: float
    min_lr: float
    seconds: float | None = None

    def epoch_at(self, step: int) -> float:
        """Passes over the data completed after `step` steps."""
        return step * self.effective_batch / self.dataset_size

    @property
    def goal(self) -> str:
        """Where a run ends, in words."""
        return f"{self.seconds:g} s" if self.steps is None else str(self.steps)

    def is_over(self, step: int, seconds: float) -> bool:
        """Whether a run that made so many steps in so many seconds of training is at its end."""
        return seconds >= self.seconds if self.steps is None else step >= self.steps

    def lr_at(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of step number `step`, counted from 0: linear warm-up from 0, then half a cosine to min_lr,
        both over fractions of epochs, as MAE's `lr_sched` (arXiv 2111.06377 appendix A.1). A run limited in time is
        where its share of the seconds says, and `seconds` are those that it has trained."""
        epoch = self.epoch_at(step) if self.steps is not None else self.epochs * seconds / self.seconds
        if epoch < self.warmup_epochs:
            return self.peak_lr * epoch / self.warmup_epochs
        done = min(1.0, (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs))
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def resolve_batch(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """(accum_steps, effective_batch). Raises UsageError when one pass over all ranks does not divide the latter."""
    per_pass = train.batch_size * world_size
    if train.effective_batch is None:
        return train.accum_steps, per_pass * train.accum_steps
    if train.effective_batch % per_pass:
        raise UsageError(
            f"train.effective_batch={train.effective_batch} is not a multiple of train.batch_size x processes = "
            f"{train.batch_size} x {world_size}; one must divide {train.effective_batch / world_size:g}"
        )
    accum = train.effective_batch // per_pass
    if train.accum_steps not in (1, accum):
        raise UsageError(
            f"train.accum_steps={train.accum_steps} and train.effective_batch={train.effective_batch} disagree: with "
            f"{per_pass} images a pass the latter makes {accum}; give one of the two"
        )
    return accum, train.effective_batch


def make_schedule(train: TrainConfig, dataset_size: int, world_size: int) -> Schedule:
    """The schedule of a run. Raises UsageError when the batch exceeds the data or the warm-up the run."""
    accum, batch = resolve_batch(train, world_size)
    if batch > dataset_size:
        lower = "train.batch_size" if train.effective_batch is None else "train.effective_batch"
        raise UsageError(
            f"a batch of {batch} images (train.batch_size {train.batch_size} x accum_steps {accum} x processes "
            f"{world_size}) is larger than the dataset of {dataset_size}; lower {lower}"
        )
    if train.seconds is not None:
        epochs, steps = float(train.epochs), None
    elif train.steps is None:
        epochs, steps = float(train.epochs), max(1, math.ceil(train.epochs * dataset_size / batch))
    else:
        epochs, steps = train.steps * batch / dataset_size, train.steps
    if train.warmup_epochs >= epochs:
        raise UsageError(
            f"train.warmup_epochs={train.warmup_epochs:g} must be less than the run's {epochs:g} epochs; lower it"
        )
    lr = train.base_lr * batch / 256 if train.lr is None else train.lr
    if train.min_lr > lr:
        raise UsageError(f"train.min_lr={train.min_lr:g} exceeds the peak learning rate {lr:g}")
    return Schedule(
        dataset_size,
        train.batch_size,
        accum,
        batch,
        steps,
        train.warmup_epochs,
        epochs,
        lr,
        train.min_lr,
        train.seconds,
    )
