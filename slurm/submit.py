"""Submit any task to SLURM: `python slurm/submit.py TASK CONFIG [key=value ...] [--nodes N --gpus-per-node G ...]`.

The main path, top to bottom: command line and profile -> runs, with absolute paths -> their folders checked -> one job,
or one job array. Each rank of it calls `fcmae.TASK.main`, as `torchrun -m fcmae.TASK` would. docs/slurm.md tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fcmae import config as settings
from fcmae.__main__ import COMMANDS
from fcmae.errors import UsageError, nearest
from fcmae.launch import Launch
from here import plan_here, run_here
from jobs import Run, call, leave_job, remember, with_own_config
from options import COMMAND_LINE, Resources, delay, other_options, rank_count, resources
from paths import absolute_overrides, check_shared, make_writable, out_of

TASKS = [name.removeprefix("fcmae.") for name, what in COMMANDS.items() if "CONFIG.yaml" in what]


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 submitted (with --local: done), 2 bad input, 1 else."""
    try:
        return submit(parse(sys.argv[1:] if argv is None else argv))
    except ModuleNotFoundError as error:
        if error.name != "submitit":
            raise
        message = 'submitit is not installed: pip install -e ".[slurm]"'
    except (UsageError, OSError) as error:
        message = " ".join(str(error).split())
    print(f"submit: error: {message}", file=sys.stderr)
    return 2


def submit(given: argparse.Namespace) -> int:
    """Submit, or show, what the command line says; see `main`. Raises UsageError for bad input."""
    if given.task not in TASKS:
        raise UsageError(
            f"no task {given.task!r} that takes a CONFIG{nearest(given.task, TASKS)}; they are {', '.join(TASKS)}"
        )
    wanted = resources(given.profile, {k: v for k in COMMAND_LINE if (v := getattr(given, k)) is not None})
    if given.local and wanted.nodes > 1:
        raise UsageError("--local is this machine alone: --nodes 1, with --tasks-per-node or --gpus-per-node")
    base, runs = runs_of(given)
    if not given.local and not given.not_shared:
        for folder in (base, *(run.out for run in runs if not run.out.is_relative_to(base))):
            if warning := check_shared(folder):
                print(f"submit: warning: {warning}", file=sys.stderr)
    if given.dry_run:
        print(plan_here(base, runs, wanted) if given.local else sbatch_script(base, runs, wanted))
        return 0
    for folder in (base, *(run.out for run in runs)):
        make_writable(folder / "slurm")
    runs = with_own_config(base, runs)
    return run_here(base, runs, wanted) if given.local else to_slurm(base, runs, wanted)


def runs_of(given: argparse.Namespace) -> tuple[Path, list[Run]]:
    """The folder that was named with out=, and the runs: one there, or one for each line of --array.

    Raises UsageError when a folder is missing or named twice, or a file cannot be read.
    """
    base = out_of(given.config, given.overrides)
    if base is None:
        raise UsageError("say where the run goes: out=FOLDER" + ", for --array that of the sweep" * bool(given.array))
    config = os.path.abspath(given.config)
    settings.check_repeats(given.overrides)

    def run(overrides: list[str], out: Path) -> Run:
        keys = [text.partition("=")[0] for text in overrides]  # a line's count, not those of all the same
        overrides = [text for i, text in enumerate(overrides) if keys[i] not in ("out", *keys[i + 1 :])]
        overrides = [*absolute_overrides(config, overrides), f"out={out}"]
        return Run(out, Launch(given.task, (config, *overrides)))

    if not given.array:
        return base, [run(given.overrides, base)]
    runs = []
    for number, line in enumerate(lines_of(given.array)):
        if wrong := [word for word in line if "=" not in word]:
            raise UsageError(f"--array {given.array}: {wrong[0]!r} is not of the form key=value")
        settings.check_repeats(line)
        own = out_of(config, line) if any(word.startswith("out=") for word in line) else base / str(number)
        if own in [run.out for run in runs]:
            raise UsageError(f"--array {given.array}: two runs have out={own}")
        runs.append(run([*given.overrides, *line], own))
    if not runs:
        raise UsageError(f"--array {given.array} has no line of overrides")
    return base, runs


def lines_of(path: str) -> list[list[str]]:
    """The words of every line that has any. Raises UsageError for a file that is not there or no text, or a quote."""
    if not Path(path).is_file():
        raise UsageError(f"--array {path}: no such file; it has one line of overrides for each run")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"--array {path} is no text in UTF-8; it has one line of overrides for each run") from None
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found.append(shlex.split(line, comments=True))
        except ValueError as error:
            raise UsageError(f"--array {path}, line {number}: {str(error).lower()}; close the quote") from None
    return [line for line in found if line]


def to_slurm(base: Path, runs: list[Run], wanted: Resources) -> int:
    """One job or job array. Raises UsageError with sbatch's reason when it is refused."""
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError

    leave_job()
    executor = slurm_executor(base, runs, wanted)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # submitit shows there what it then puts into the error, too
            jobs = executor.submit_array([run.launch for run in runs])
    except (UncompletedJobError, FailedSubmissionError) as error:
        raise UsageError(str(error)) from None
    sys.stderr.write(said.getvalue())
    for job, run in zip(jobs, runs, strict=True):
        remember(job.job_id, base, run, wanted)
        print(f"job {job.job_id}: fcmae.{run.launch.task} in {run.out}")
    print(f"{wanted.nodes} x {rank_count(wanted)} ranks, a log of each in {base / 'slurm'}")
    print(
        f"watch: python {shlex.quote(os.path.relpath(Path(__file__).with_name('watch.py')))} {shlex.quote(str(base))}"
    )
    return 0


def slurm_executor(base: Path, runs: list[Run], wanted: Resources):
    """submitit's executor with the options of the job. Raises UsageError without SLURM."""
    from submitit import SlurmExecutor

    try:
        executor = SlurmExecutor(base / "slurm", python=wanted.python)
    except RuntimeError:
        raise UsageError("no srun on this machine: submit where SLURM is, or run here with --local") from None
    executor.update_parameters(**parameters(base, runs, wanted))
    return executor


def parameters(base: Path, runs: list[Run], wanted: Resources) -> dict:
    """The job in submitit's words."""
    logs = shlex.quote(str(base / "slurm"))
    folders = " ".join(shlex.quote(str(run.out)) for run in runs)
    srun = ["--kill-on-bad-exit=1", "--wait=0"]
    # Ranks that share a node would else each take all of its cores.
    # A `set -e` in the setup would end the script before it comes to its end, which requeues.
    setup = [*wanted.setup, "set +e", "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"]
    if wanted.cpus_per_task:
        srun.append(f"--cpus-per-task={wanted.cpus_per_task}")  # since 22.05 srun does not take it from sbatch
    end = Path(__file__).resolve().with_name("requeue.py")
    host_python = "python3" if wanted.python else shlex.quote(sys.executable)  # the script is outside of any container
    found = {
        "job_name": f"fcmae-{runs[0].launch.task}",
        "nodes": wanted.nodes,
        "ntasks_per_node": rank_count(wanted),
        "time": wanted.timeout,
        "signal_delay_s": delay(wanted),
        "stderr_to_stdout": True,  # one file per rank
        "srun_args": srun,
        "setup": setup,
        "teardown": [
            "status=$?",
            f"runs=({folders})",
            f'{host_python} {shlex.quote(str(end))} --run "${{runs[${{SLURM_ARRAY_TASK_ID:-0}}]}}" '
            f"--logs {logs} --status $status --restarts {wanted.restarts}",
        ],
        "additional_parameters": {"requeue": True, **other_options(wanted)},
    }
    for key in ("gpus_per_node", "cpus_per_task", "mem", "partition", "account", "qos", "constraint"):
        if getattr(wanted, key) is not None:
            found[key] = getattr(wanted, key)
    return found


def sbatch_script(base: Path, runs: list[Run], wanted: Resources) -> str:
    """The script that would be submitted, and as comments what its ranks would call. Needs no SLURM."""
    from submitit import SlurmExecutor

    class WithoutSlurm(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = WithoutSlurm(base / "slurm", python=wanted.python)
    executor.update_parameters(**parameters(base, runs, wanted))
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    text = executor._make_submission_file_text(executor._submitit_command_str, "")
    told = "# what each rank calls, with a copy of the config file as it is now"
    return "\n".join([text.rstrip("\n"), "", told, *(f"# {call(run)}" for run in runs)])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises UsageError."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise UsageError(f"{message}; --help lists everything")

    parser = Parser(prog="submit.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("task", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("config", metavar="CONFIG", help="of the task")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="of the task; out=FOLDER is the run's folder")
    for key, (kind, default, text) in settings.describe(Resources).items():
        if key in COMMAND_LINE:
            known = "" if default is None else f" (default {default})"
            parser.add_argument(f"--{key.replace('_', '-')}", metavar=kind.split(" ")[0].upper(), help=text + known)
    parser.add_argument("--profile", metavar="FILE", help="YAML with any of the options above, and setup, sbatch")
    parser.add_argument("--array", metavar="FILE", help="a job array: a run for each line of overrides, in out/NUMBER")
    parser.add_argument("--not-shared", action="store_true", help="out= need not look like a shared folder")
    parser.add_argument("--local", action="store_true", help="run here, without SLURM, until it ends")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, or run; write nothing")
    given = parser.parse_intermixed_args(argv)
    if wrong := [word for word in given.overrides if "=" not in word]:
        raise UsageError(f"{wrong[0]!r} is not of the form key=value")
    return given


if __name__ == "__main__":
    sys.exit(main())
