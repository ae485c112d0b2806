"""Where runs stand: `python slurm/watch.py RUN [RUN ...] [--follow] [--lines N]`.

State, step, loss, img/s, time left, and the last lines of every rank's log. Reads the run's folder, and asks squeue if
it is there; needs neither SLURM nor sacct, and never touches what it reads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from fcmae import config as settings
from fcmae.errors import UsageError

RECENT = 20  # logged steps over which speed is averaged


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="watch.py", description=__doc__.split("\n\n")[1])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, a comparison's or a sweep's")
    parser.add_argument("--lines", type=int, default=3, metavar="N", help="of each log (default 3)")
    parser.add_argument("--follow", action="store_true", help="again every 10 seconds, until interrupted")
    given = parser.parse_args(argv)
    try:
        while True:
            text = "\n\n".join(describe(run, given.lines) for run in given.runs)
            if given.follow and sys.stdout.isatty():
                print("\033[2J\033[H", end="")
            print(text, flush=True)
            if not given.follow:
                return 0
            print(flush=True)
            time.sleep(10)
    except UsageError as error:
        print(f"watch: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


def describe(run: Path, lines: int) -> str:
    """What there is to say of a run, or of all runs in the folder. Raises UsageError if there are none."""
    if not run.is_dir():
        raise UsageError(f"{run} is no folder")
    runs = runs_in(run)
    if not runs and not (run / "slurm").is_dir():
        raise UsageError(f"{run} holds no run and no job")
    told = []
    for folder in runs or [run]:
        told.append(f"{folder}: {state(folder, run)}{progress(folder)}")
        if jobs_of(folder):  # of a sweep each has its own
            told += logs(folder, lines)
    return "\n".join(told + ([] if run in runs or not runs else logs(run, lines)))


def runs_in(run: Path) -> list[Path]:
    """The run itself, a comparison's arms, or the runs of a sweep."""
    if (run / "metrics.jsonl").is_file():
        return [run]
    found = [*run.glob("arms/*/config.yaml"), *run.glob("*/config.yaml"), *run.glob("*/slurm/jobs.json")]
    return sorted({p.parent.parent if p.name == "jobs.json" else p.parent for p in found}, key=natural)


def natural(path: Path) -> tuple:
    """An order in which 10 follows 9."""
    return (0, int(path.name), "") if path.name.isdigit() else (1, 0, path.name)


def state(run: Path, top: Path) -> str:
    """In one or a few words: SLURM's state of its job if it has one now, else what the files say."""
    job = job_of(run) or job_of(top)
    if job and (found := queued(job)):
        return found
    if job:
        folder, name = Path(job["logs"]), job["job"]
        if failed := sorted(folder.glob(f"{name}_*_failed")):
            ranks = ", ".join(p.stem.split("_")[-2] for p in failed)
            return f"job {name} failed on rank {ranks}"
        if (folder / f"{name}_0_result.pkl").exists():
            return f"job {name} done"
    if (run / "encoder.safetensors").exists():
        return "done"
    if moves(run):
        return "running"
    return f"job {job['job']} ended early" if job else "stopped"


def queued(job: dict) -> str | None:
    """What SLURM says of a job that it has now; None of any other, or without SLURM."""
    if not shutil.which("squeue"):
        return None
    asked = subprocess.run(["squeue", "-h", "-j", job["job"], "-o", "%T|%r|%M|%l|%N"], capture_output=True, text=True)
    if asked.returncode or not asked.stdout.strip():
        return None
    word, reason, used, limit, nodes = asked.stdout.strip().splitlines()[0].split("|")
    if word in ("RUNNING", "COMPLETING"):
        return f"job {job['job']} {word.lower()} on {nodes}, {used} of {limit}"
    if word in ("PENDING", "SUSPENDED", "CONFIGURING"):
        return f"job {job['job']} {word.lower()} ({reason})"
    return None


def moves(run: Path) -> bool:
    """Whether a step was logged in the last two minutes."""
    times = run / "times.jsonl"
    return times.exists() and time.time() - times.stat().st_mtime < 120


def job_of(run: Path) -> dict | None:
    """The newest job of a run that is queued or running; or else the newest that did not fail while the run goes on."""
    jobs = jobs_of(run)[::-1]
    live = [job for job in jobs if queued(job)] if len(jobs) > 1 else []
    if not live and moves(run):  # a second copy, which was refused, says nothing about it
        live = [job for job in jobs if not list(Path(job["logs"]).glob(f"{job['job']}_*_failed"))]
    return next(iter([*live, *jobs]), None)


def jobs_of(run: Path) -> list[dict]:
    """What submit.py noted of the run's jobs, the oldest first."""
    path = run / "slurm" / "jobs.json"
    return json.loads(path.read_text()) if path.is_file() else []


def progress(run: Path) -> str:
    """`, step 12 of 60, epoch 2.4, loss 0.87, 31 img/s, 0:00:12 left`, as far as the files tell."""
    rows, times = last_rows(run / "metrics.jsonl", RECENT), last_rows(run / "times.jsonl", RECENT)
    if not rows:
        return ", no step yet"
    last = rows[-1]
    train = settings.read_yaml(run / "config.yaml").get("train", {}) if (run / "config.yaml").is_file() else {}
    steps, step = train.get("steps"), last["step"]
    if steps is None and train.get("seconds") is None and train.get("epochs") and last.get("epoch"):
        steps = max(step, round(train["epochs"] * step / last["epoch"]))
    told = [f"step {step}" + (f" of {steps}" if steps else "")]
    if last.get("epoch") is not None:
        told.append(f"epoch {last['epoch']:.2f}")
    told.append("loss nan" if last.get("loss") is None else f"loss {last['loss']:.4f}")
    if len(times) > 1 and times[-1]["seconds"] > times[0]["seconds"]:
        pace = (times[-1]["seconds"] - times[0]["seconds"]) / (times[-1]["step"] - times[0]["step"])
        if last.get("images"):
            told.append(f"{last['images'] / step / pace:.0f} img/s")
        left = train["seconds"] - times[-1]["seconds"] if train.get("seconds") else pace * ((steps or step) - step)
        if left > 0:
            told.append(f"{datetime.timedelta(seconds=round(left))} left")
    return ", " + ", ".join(told)


def last_rows(path: Path, count: int) -> list[dict]:
    """The last whole lines of a file of JSON objects."""
    return [json.loads(line) for line in tail(path, count) if line.startswith("{") and line.endswith("}")]


def tail(path: Path, count: int) -> list[str]:
    """The last lines of a file, without reading all of a long one."""
    if not path.is_file() or count < 1:
        return []
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        start = max(0, size - 1000 * count - 4000)
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return list(deque(lines[1:] if start else lines, maxlen=count))


def logs(run: Path, lines: int) -> list[str]:
    """The last lines of the logs of the newest job, of every rank."""
    job = job_of(run)
    if job is None or lines < 1:
        return []
    told = []
    for rank in range(job["ranks"]):
        path = Path(job["logs"]) / f"{job['job']}_{rank}_log.out"
        said = [line for line in tail(path, lines + 4) if not line.startswith("submitit INFO")]
        told += [f"  [rank {rank}] {line}" for line in said[-lines:]]
    return told


if __name__ == "__main__":
    sys.exit(main())
