"""The end of a job's script, on its first node: should SLURM start it again? Needs nothing but Python.

`requeue.py --run RUN --logs FOLDER --status N --restarts M`, N being srun's exit status; its own is the job's.

A job starts again when it was ended by a signal (ahead of a preemption or its time limit, after saving; or killed) or
its ranks lost one another. It does not when a rank said that something is wrong, when SLURM is ending it anyway (a
user's scancel; a preemption or a lost node, after which SLURM requeues by itself), or when M starts in a row wrote no
new checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

LOST_OTHERS = 75  # of fcmae/launch.py


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--status", type=int)
    parser.add_argument("--restarts", type=int)
    given = parser.parse_args()
    job = os.environ["SLURM_JOB_ID"]
    name = job
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        name = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"

    if given.status == 0:
        return 0
    failed = {int(p.stem.split("_")[-2]): p for p in given.logs.glob(f"{name}_*_failed")}
    if failed:
        first = min(failed)
        if first != 0:  # whose own words would stand above
            say(f"rank {first}: {last_line(given.logs / f'{name}_{first}_log.out')}")
        say("not requeued: trying again would end the same way")
        return int(failed[first].read_text() or 1)
    if given.status != LOST_OTHERS and given.status <= 128:
        say(f"not requeued: srun ended with status {given.status}")
        return given.status
    if (state := state_of(job)) != "RUNNING":
        say(f"not requeued: the job is {state or 'gone'}")  # SLURM ends it, and requeues it if it means to
        return given.status
    idle = starts_without_progress(given.run, given.logs / f"{name}_restarts.json")
    if idle >= given.restarts:
        say(f"not requeued: {idle} starts in a row wrote no new checkpoint; give it more time, or see the ranks' logs")
        return given.status
    say(f"requeued after status {given.status}")
    subprocess.run(["scontrol", "requeue", job], check=True)
    time.sleep(600)  # SLURM ends this script; were it to end by itself just now, the job could be taken for failed
    return given.status


def say(line: str) -> None:
    """One line in the log of rank 0, which is the script's too."""
    print(f"slurm: {line}", flush=True)


def state_of(job: str) -> str:
    """The job's state in SLURM's words."""
    return subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip()


def last_line(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), f"see {log}")


def starts_without_progress(run: Path, state: Path) -> int:
    """How many starts in a row, this one included, left the newest checkpoints as they were; kept in `state`."""
    before = json.loads(state.read_text()) if state.is_file() else {"newest": [], "idle": 0}
    folders = sorted(p for p in run.rglob("checkpoints") if p.is_dir())
    newest = [max((str(p.relative_to(run)) for p in folder.glob("step_*")), default="") for folder in folders]
    idle = before["idle"] + 1 if newest == before["newest"] or not any(newest) else 0
    part = state.with_suffix(".part")
    part.write_text(json.dumps({"newest": newest, "idle": idle}))
    part.replace(state)
    return idle


if __name__ == "__main__":
    sys.exit(main())
