"""A run of a job, what it is given besides its command line, and what is noted of it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from fcmae.files import write_whole
from fcmae.launch import Launch
from options import Resources, rank_count

# Of the environment of a job, or of torchrun, what is the user's: how to reach SLURM.
USERS_OWN = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
LAUNCHERS = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "TORCHELASTIC_")
TORCHRUN = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of the job: its folder and what it calls on every rank."""

    out: Path
    launch: Launch


def call(run: Run) -> str:
    """What each rank calls, as a command line."""
    return shlex.join(["python", "-m", f"fcmae.{run.launch.task}", *run.launch.arguments])


def with_own_config(base: Path, runs: list[Run]) -> list[Run]:
    """The runs with a copy of their config file: every start reads it, and the user's may have been edited by then."""
    text = Path(runs[0].launch.arguments[0]).read_bytes()
    copy = base / "slurm" / f"config_{hashlib.sha256(text).hexdigest()[:12]}.yaml"  # an earlier job's may differ
    write_whole(copy, lambda file: file.write(text))
    return [Run(run.out, Launch(run.launch.task, (str(copy), *run.launch.arguments[1:]))) for run in runs]


def remember(job: str, base: Path, run: Run, wanted: Resources) -> None:
    """Note for watch.py which job this run is and where its logs are, after the jobs that it was before."""
    told = {
        "job": job,
        "logs": str(base / "slurm"),
        "ranks": wanted.nodes * rank_count(wanted),
        "task": run.launch.task,
    }
    path = run.out / "slurm" / "jobs.json"
    known = json.loads(path.read_text()) if path.is_file() else []
    write_whole(path, lambda file: file.write(json.dumps([*known, told], indent=1).encode()))


def leave_job() -> None:
    """Forget the job that this process runs in, if any: its variables would be taken for the new job's."""
    for key in list(os.environ):
        if key in TORCHRUN or (key.startswith(LAUNCHERS) and key not in USERS_OWN):
            del os.environ[key]
