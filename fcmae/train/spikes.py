"""Spikes of the loss: the run goes back to its last checkpoint and passes over the images that led to the spike.

After PaLM (arXiv 2204.02311 §5.1), whose spikes came from the state of the weights and certain batches together, so
that other batches after an earlier checkpoint did not bring them back. There that was one of some 100 steps before, and
200 to 500 batches were passed over; here it is the newest regular one, and the batches up to the spike's are.
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

    What it compares with, and how often it went back, are in the run's progress: a run that goes on does the same.
    """

    def __init__(self, factor: float | None, state: TrainState):
        self.factor, self.state = factor, state

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

    def go_back(self, spike: Spike, restore: Callable[[], list[str]]) -> list[str]:
        """Go back by `restore`, which restores the state from a checkpoint and names those it passed over, and on with
        the images that follow the spike's; lines for the run's users.

        Raises UsageError where the run has gone back to the same checkpoint too often.
        """
        spiked = self.state.progress
        damaged = restore()
        here = self.state.progress
        here.tries, here.back_at = spiked.tries + 1 if spiked.back_at == here.step else 1, here.step
        if here.tries > TRIES:
            raise UsageError(
                f"{spike}; the run went back to its checkpoint of step {here.step} {TRIES} times and got no further: "
                f"raise train.spike_factor, or branch off, resume=CHECKPOINT out=NEW, with a lower learning rate or "
                f"train.clip_grad"
            )
        passed = spiked.step + 1 - here.step
        here.ahead, here.rollbacks = spiked.ahead + passed, spiked.rollbacks + 1
        here.seconds = spiked.seconds  # the time is spent, whatever became of it
        said = f"{spike}; back to step {here.step}, and on past the images of {passed} steps"
        return [f"warning: {line}" for line in (said, *damaged)]
