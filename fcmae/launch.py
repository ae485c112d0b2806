"""What runs on every rank of a job that slurm/submit.py submitted: a task's `main`, and the end that the job's script
understands. Nothing about resuming is kept here: a run finds its newest checkpoint by itself.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from fcmae.errors import TryAgain
from fcmae.train.loop import STOPPING
from fcmae.train.place import find_place, rank_label

FAILED, LOST_OTHERS = 1, TryAgain.status  # exit statuses; more than 128: ended by a signal
STARTING = 300  # seconds that the ranks of one machine may be apart in beginning


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
        mine = f"{job.job_id}_{job.global_rank}"
        failed, saved, running = (job.paths.folder / f"{mine}_{word}" for word in ("failed", "saved", "running"))
        for note in (failed, saved, job.paths.result_pickle):  # of an earlier job of the same number
            note.unlink(missing_ok=True)
        alone = os.environ.get("SUBMITIT_EXECUTOR") == "local"  # there is nothing like srun, which ends all for one
        if alone:
            running.write_text(f"{os.getpid()}\n")
            self._await_all(job.paths.folder, job.job_id)
            threading.Thread(target=self._follow, args=(job.paths.folder, job.job_id, running), daemon=True).start()
        status = self._run()
        if status > 128 and alone:
            saved.write_text(f"{status}\n")  # submitit's controller tells nobody how its processes ended
        if status == 0 or status > 128:
            running.unlink(missing_ok=True)
        if status > 128:
            sys.exit(status)
        if status:
            if status != LOST_OTHERS:
                failed.write_text(f"{status}\n")  # the launcher may end others first, whose statuses would hide this
            leave(status)

    def _await_all(self, folder: Path, job: str) -> None:
        """End this process when another rank does not begin: it would be waited for much longer where ranks meet."""
        deadline = time.monotonic() + STARTING
        while absent := [r for r in range(find_place().size) if not (folder / f"{job}_{r}_running").exists()]:
            if time.monotonic() > deadline:
                said = f"rank {absent[0]} did not begin in {STARTING} s; its log in {folder} may tell why"
                print(f"fcmae.{self.task}: error: {rank_label(find_place())}{said}", flush=True)
                leave(LOST_OTHERS)
            time.sleep(0.1)

    def _follow(self, folder: Path, job: str, mine: Path) -> None:
        """End this process when another rank's is gone that did not end well, which leaves its note behind."""
        while True:
            time.sleep(1)
            for note in folder.glob(f"{job}_*_running"):
                if note != mine and is_gone(note):
                    print(f"fcmae.{self.task}: error: {rank_label(find_place())}rank {note.stem.split('_')[-2]} ended")
                    leave(LOST_OTHERS)

    def _run(self) -> int:
        try:
            return importlib.import_module(f"fcmae.{self.task}").main(list(self.arguments))
        except Exception as error:
            traceback.print_exc()
            text = f"{rank_label(find_place())}{type(error).__name__}: {error}"
            print(f"fcmae.{self.task}: error: {text}", file=sys.stderr)
            return FAILED


def leave(status: int) -> None:
    """End this process now: no thread of a broken communicator holds it up, and the others wait for this end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_gone(note: Path) -> bool:
    """Whether the process whose number is in a file ended and left the file behind."""
    try:
        os.kill(int(note.read_text()), 0)
    except ProcessLookupError:
        return note.exists()
    except (OSError, ValueError):  # the file went, is being written, or is of another user's process
        pass
    return False
