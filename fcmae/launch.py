"""What runs on every rank of a job that slurm/submit.py submitted: a task's `main`, and the end that the job's script
understands. Nothing about resuming is kept here: a run finds its newest checkpoint by itself.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from dataclasses import dataclass

import torch.distributed as dist

from fcmae.train.loop import STOPPING
from fcmae.train.place import find_place, rank_label

FAILED, LOST_OTHERS = 1, 75  # exit statuses; 75 is sysexits' "try again"; more than 128: ended by a signal


@dataclass(frozen=True)
class Launch:
    """`python -m fcmae.TASK *arguments` as one rank of a submitit job; pickled, it holds these words and no more."""

    task: str
    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Returns when the task is done; otherwise exits, with the task's status if it ended by itself."""
        from submitit import JobEnvironment

        for number in (*STOPPING, signal.SIGCONT):  # instead of submitit's, which requeue before anything is saved
            signal.signal(number, signal.SIG_DFL)
        job = JobEnvironment()
        note = job.paths.folder / f"{job.job_id}_{job.global_rank}_failed"
        note.unlink(missing_ok=True)
        status = self._run()
        if status > 128:
            sys.exit(status)
        if status:
            if status != LOST_OTHERS:
                note.write_text(f"{status}\n")  # the launcher may end others first, whose statuses would hide this one
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # no thread of a broken communicator holds it up: the others wait for this end

    def _run(self) -> int:
        try:
            return importlib.import_module(f"fcmae.{self.task}").main(list(self.arguments))
        except Exception as error:
            traceback.print_exc()
            text = f"{rank_label(find_place())}{type(error).__name__}: {error}"
            print(f"fcmae.{self.task}: error: {text}", file=sys.stderr)
            return LOST_OTHERS if lost_others(error) else FAILED


def lost_others(error: Exception) -> bool:
    """Whether an exception says that other ranks could not be reached, rather than what went wrong there."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
