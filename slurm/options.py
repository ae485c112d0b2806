"""What a job asks of the cluster: defaults, then a profile, then the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fcmae import config as settings
from fcmae.errors import UsageError
from fcmae.schema import setting


@dataclass
class Resources:
    """What a job asks of the cluster; each is an option of slurm/submit.py and a key of a profile."""

    nodes: int = setting(1, "machines")
    gpus_per_node: str | None = setting(None, "GPUs on each, one rank for each; also TYPE:N; null: none")
    tasks_per_node: int | None = setting(None, "ranks on each; null: one per GPU, or one")
    cpus_per_task: int | None = setting(None, "cores of each rank, for its loader workers; null: the site's default")
    mem: str | None = setting(None, "memory of each node, e.g. 200G; null: the site's default")
    timeout: int = setting(60, "minutes; a job that needs more goes on in the next")
    signal_delay: int | None = setting(
        None, "seconds before the time limit at which ranks save and leave; null: 120, a quarter of a short limit"
    )
    restarts: int = setting(3, "starts in a row that wrote no new checkpoint after which the job is not requeued")
    partition: str | None = setting(None, "as sbatch's")
    account: str | None = setting(None, "as sbatch's")
    qos: str | None = setting(None, "as sbatch's")
    constraint: str | None = setting(None, "as sbatch's")
    python: str | None = setting(None, "the interpreter on the nodes, or a container's command; null: this one")
    setup: list[str] = setting([], "shell lines before the job, e.g. `module load cuda`")
    sbatch: list[str] = setting([], "any other options of sbatch, e.g. --exclude=n7")


COMMAND_LINE = tuple(key for key in settings.describe(Resources) if key not in ("setup", "sbatch"))


def resources(profile: str | None, given: dict[str, str]) -> Resources:
    """Defaults, a profile's keys and options of the command line, the later over the earlier.

    Raises UsageError for keys and values that will not do.
    """
    found = settings.load(Resources, profile, []) if profile else Resources()
    for key, value in given.items():
        found = settings.override(found, {key: value}, f"--{key.replace('_', '-')} {value}")
    for key in ("nodes", "tasks_per_node", "cpus_per_task", "timeout", "signal_delay", "restarts"):
        value = getattr(found, key)
        if value is not None and value < 1:
            raise UsageError(f"{key}={value} will not do: it must be 1 or more")
    for option in found.sbatch:
        if not re.fullmatch(r"--[a-z][a-z-]*(=.+)?", option):
            raise UsageError(f"sbatch: {option} will not do: each must be --name or --name=value")
    gpus = found.gpus_per_node
    if gpus is not None and not re.fullmatch(r"(\S+:)?\d+", gpus):
        raise UsageError(f"gpus_per_node={gpus} will not do: it must be a number or TYPE:NUMBER")
    if delay(found) >= 60 * found.timeout:
        raise UsageError(f"signal_delay={found.signal_delay} s leaves nothing of a timeout of {found.timeout} min")
    return found


def delay(wanted: Resources) -> int:
    """Seconds before the time limit at which SLURM sends its signal."""
    return wanted.signal_delay or min(120, 15 * wanted.timeout)


def other_options(wanted: Resources) -> dict[str, str | bool]:
    """Options of sbatch that have no name here, by theirs."""
    split = (option.removeprefix("--").partition("=") for option in wanted.sbatch)
    return {name: value if sign else True for name, sign, value in split}


def gpu_count(wanted: Resources) -> int:
    """GPUs on each node."""
    return int(wanted.gpus_per_node.rpartition(":")[2]) if wanted.gpus_per_node else 0


def rank_count(wanted: Resources) -> int:
    """Ranks on each node."""
    return wanted.tasks_per_node or gpu_count(wanted) or 1
