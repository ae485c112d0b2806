"""`--local`: the same runs on this machine, one after another, by submitit's local executor."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path

from fcmae.errors import UsageError
from fcmae.launch import is_gone
from jobs import Run, call, leave_job, remember
from options import Resources, gpu_count, rank_count

YEAR = 365 * 24 * 60  # minutes


def plan_here(base: Path, runs: list[Run], wanted: Resources) -> str:
    """What would run here."""
    told = f"# here, one run after another, {rank_count(wanted)} ranks each; logs in {base / 'slurm'}"
    return "\n".join([told, *wanted.setup, *map(call, runs)])


def run_here(base: Path, runs: list[Run], wanted: Resources) -> int:
    """The runs one after another, to their ends: the first exit status that is not 0.

    Raises UsageError when more GPUs are asked for than CUDA_VISIBLE_DEVICES names.
    """
    from submitit import LocalExecutor

    gpus = gpu_count(wanted)
    if wanted.gpus_per_node is None:
        import torch

        gpus = min(1, torch.cuda.device_count())
    leave_job()
    share = max(1, (os.cpu_count() or 1) // rank_count(wanted))
    os.environ.setdefault("OMP_NUM_THREADS", str(wanted.cpus_per_task or share))
    executor = LocalExecutor(base / "slurm", python=python_here(wanted, gpus))
    executor.update_parameters(
        timeout_min=YEAR,
        signal_delay_s=0,
        gpus_per_node=gpus,
        tasks_per_node=rank_count(wanted),
        stderr_to_stdout=True,
    )
    # Ctrl-C is for the ranks, which save and leave; this process and submitit's wait for them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for run in runs:
        forget_the_gone(base / "slurm")
        job = executor.submit(run.launch)
        signal.signal(signal.SIGTERM, lambda *_, job=job: job._process.terminate())
        remember(job.job_id, base, run, wanted)
        print(f"fcmae.{run.launch.task} in {run.out}, process {job.job_id}; logs: {job.paths.stdout}", flush=True)
        job._process.wait()
        forget_the_gone(base / "slurm")
        if status := ended(run, job, rank_count(wanted)):
            return status
    return 0


def python_here(wanted: Resources, gpus: int) -> str:
    """The command that starts Python, after the lines of `setup` and with the first of the GPUs that the user left it.

    Given to submitit as its own `setup` they would put a shell between it and the ranks, which keeps SIGTERM to itself;
    and its `visible_gpus` takes numbers only.
    """
    python = wanted.python or shlex.quote(sys.executable)
    lines = list(wanted.setup)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name for name in visible.split(",") if name]
        if gpus > len(names):
            raise UsageError(f"gpus_per_node={gpus} will not do: CUDA_VISIBLE_DEVICES={visible} names {len(names)}")
        lines.insert(0, f"export CUDA_VISIBLE_DEVICES={shlex.quote(','.join(names[:gpus]))}")
    if not lines:
        return python
    script = "\n".join([*lines, 'exec "$@"'])
    return f"bash -c {shlex.quote(script)} bash {python}"


def forget_the_gone(logs: Path) -> None:
    """Remove what ranks left that did not end well: their process numbers may come again."""
    for note in logs.glob("*_running"):
        if is_gone(note):
            note.unlink(missing_ok=True)


def ended(run: Run, job, ranks: int) -> int:
    """The exit status of a job that ran here, said unless it is 0."""
    unfinished = [task for task in range(ranks) if not job.task(task).paths.result_pickle.exists()]
    if not unfinished:
        return 0
    folder = job.paths.folder
    failed, saved = (sorted(folder.glob(f"{job.job_id}_*_{word}")) for word in ("failed", "saved"))
    if saved and not failed:
        print(f"submit: {run.out} was told to end, and is saved; the same command goes on from there", file=sys.stderr)
        return int(saved[0].read_text())
    first = failed[0].stem.split("_")[-2] if failed else unfinished[0]
    print(f"submit: {run.out} did not end well; see {job.task(int(first)).paths.stdout}", file=sys.stderr)
    return int(failed[0].read_text()) if failed else 1
