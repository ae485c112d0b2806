"""The end of a job's script, on its first node: should SLURM start it again? Needs nothing but Python 3.6.

Where a profile's `python` is a container's command, this script is outside of it and has what the node calls python3,
which on long-lived systems is that old.

`requeue.py --run RUN --logs FOLDER --status N --restarts M`, N being srun's exit status; its own is the job's.

A job starts again when it was ended by a signal (ahead of a preemption or its time limit, after saving; or killed),
its ranks lost one another, or srun itself failed. It does not when a rank said that something is wrong, when SLURM is
ending it anyway (a user's scancel; a preemption or a lost node, after which SLURM requeues by itself), or when M starts
in a row wrote no new checkpoint.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

TRIES, PAUSE, PATIENCE = 4, 3, 20  # of a question to SLURM's controller, which may be busy; seconds


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--status", type=int)
    parser.add_argument("--restarts", type=int)
    given = parser.parse_args()
    name = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        # Not its own id: one element has the whole array's, by which SLURM would take all elements.
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
    state = state_of(name)
    if state != "RUNNING":
        say(f"not requeued: the job is {state or 'gone'}")  # SLURM ends it, and requeues it if it means to
        return given.status
    idle = starts_without_progress(given.run, given.logs / f"{name}_restarts.json")
    if idle >= given.restarts:
        say(f"not requeued: {idle} starts in a row wrote no new checkpoint; give it more time, or see the ranks' logs")
        return given.status
    say(f"requeued after status {given.status}")  # before SLURM ends this script
    refusal = asked(["scontrol", "requeue", name])[1]
    if refusal is not None:
        say(f"not requeued after all, SLURM refused: {refusal}; submitted again, the run goes on")
        return given.status
    time.sleep(600)  # SLURM ends this script; were it to end by itself just now, the job could be taken for failed
    return given.status


def say(line: str) -> None:
    """One line in the log of rank 0, which is the script's too."""
    print(f"slurm: {line}", flush=True)


def state_of(name: str) -> str:
    """The job's state in SLURM's words; running, as far as anyone knows, when SLURM does not answer."""
    said, refusal = asked(["squeue", "-h", "-j", name, "-o", "%T"])
    if refusal is not None:
        say(f"squeue does not answer: {refusal}; the job is taken to be running")
        return "RUNNING"
    return said


def asked(command):
    """What a command of SLURM says, and None; or an empty string and, after some tries, why it did not work."""
    refusal = ""
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE)
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                universal_newlines=True,
                timeout=PATIENCE,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            refusal = str(error)
            continue
        if done.returncode == 0:
            return done.stdout.strip(), None
        refusal = " ".join(done.stderr.split()) or f"status {done.returncode}"
    return "", refusal


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
