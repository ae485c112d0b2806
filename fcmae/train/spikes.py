"""Spikes of the loss: the run goes back to its last checkpoint and passes over the images that led to the spike.

As PaLM was trained (arXiv 2204.02311 §5.1): its spikes came from the state of the weights and certain batches together,
and other batches after the same checkpoint did not bring them back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

from fcmae.errors import UsageError
from fcmae.train.state import TrainState

WINDOW = 100  # steps whose median loss is the measure
LEAST = 20  # steps before anything is called a spike
TRIES = 5  # to get past the same checkpoint


class Spike(Exception):
    """The loss of a step is too far above those before; the step was not made. The message is half a sentence."""


class SpikeGuard:
    """Looks at the loss of every step before it is made. Off where `factor` is None.

    What it compares with is in the run's progress, so that a run that goes on sees the same spikes.
    """

    def __init__(self, factor: float | None, state: TrainState):
        self.factor, self.state = factor, state
        self.tries: dict[int, int] = {}  # by the step gone back to

    def __call__(self, loss: float) -> None:
        """Raise Spike if the loss is one; otherwise remember it."""
        if self.factor is None:
            return
        recent = self.state.progress.recent
        if len(recent) >= LEAST and loss > self.factor * (median := statistics.median(recent)):
            raise Spike(
                f"the loss of step {self.state.progress.step + 1} is {loss:.4g}, more than train.spike_factor="
                f"{self.factor:g} times {median:.4g}, the median before it"
            )
        recent.append(loss)
        del recent[:-WINDOW]

    def go_back(self, spike: Spike, restore: Callable[[], object]) -> str:
        """Go back by `restore`, which restores the state from the newest checkpoint, and on with the images that follow
        the spike's; what to tell the run's users.

        Raises UsageError where the run has gone back to the same checkpoint too often.
        """
        spiked = self.state.progress
        restore()
        here = self.state.progress
        self.tries[here.step] = self.tries.get(here.step, 0) + 1
        if self.tries[here.step] > TRIES:
            raise UsageError(
                f"{spike}; the run went back to its checkpoint of step {here.step} {TRIES} times and got no further: "
                f"lower train.base_lr, set train.clip_grad, or raise train.spike_factor"
            )
        passed = spiked.step + 1 - here.step
        here.ahead, here.rollbacks = spiked.ahead + passed, spiked.rollbacks + 1
        here.seconds = spiked.seconds  # the time is spent, whatever became of it
        return f"warning: {spike}; back to step {here.step}, and on past the images of {passed} steps"
