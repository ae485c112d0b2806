"""Which launcher started this process, and which of its processes it is: torchrun, SLURM's srun, submitit, or none."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

PORTS = range(20_000, 30_000)  # below what systems hand out by themselves


@dataclass(frozen=True)
class Place:
    """Process `rank` of `size`; `local_rank` of `local_size` on this node.

    address: tcp://HOST:PORT of rank 0, where all meet; None where torchrun's own store serves.
    cores: how many this process was promised; None where the launcher promised none.
    """

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None
    cores: int | None = None


def find_place(env: Mapping[str, str] = os.environ) -> Place:
    """This process's place by its environment.

    SLURM's variables count only inside of a step that srun started: a batch script, or a shell in an allocation, has
    SLURM_NTASKS too and is one process all the same. So has a shell of `srun --pty`, whose other tasks
    have no terminal and end. torchrun may itself have been started by srun.
    """

    def number(key: str, default: int = 1) -> int:
        return int(env.get(key) or default)

    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(
            "torchrun", number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE")
        )
    cores = number("SLURM_CPUS_PER_TASK", 0) or None
    if number("SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in env and not _in_terminal(env):
        # A requeued job has its number again: another port, in case its predecessor is still leaving.
        job = number("SLURM_JOB_ID") + 101 * number("SLURM_RESTART_COUNT", 0)
        host = first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
        return Place(
            "SLURM",
            number("SLURM_PROCID"),
            number("SLURM_STEP_NUM_TASKS"),
            number("SLURM_LOCALID", 0),
            tasks_on_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"), number("SLURM_NODEID", 0)),
            f"tcp://{host}:{PORTS[(job + number('SLURM_STEP_ID', 0)) % len(PORTS)]}",
            cores,
        )
    if number("SUBMITIT_LOCAL_NTASKS") > 1 and "SUBMITIT_LOCAL_GLOBALID" in env:
        size, rank = number("SUBMITIT_LOCAL_NTASKS"), number("SUBMITIT_LOCAL_GLOBALID")
        port = PORTS[number("SUBMITIT_LOCAL_JOB_ID") % len(PORTS)]
        return Place("submitit", rank, size, rank, size, f"tcp://127.0.0.1:{port}")
    return Place("none", cores=cores)


def _in_terminal(env: Mapping[str, str]) -> bool:
    """Whether this is a shell of `srun --pty`. Steps that are started there inherit its variable, not its terminal."""
    if "SLURM_PTY_PORT" not in env:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: `n[01-03,7],m1` -> `n01`."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]


def tasks_on_node(tasks: str, node: int) -> int:
    """How many tasks node number `node` has of a list as SLURM writes it: `4(x2),3` -> 4, 4, 3."""
    counts = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    return counts[node] if node < len(counts) else 1


def rank_label(place: Place) -> str:
    """What a line of this process begins with where there are several and it is not the first: `[rank 3] `."""
    return f"[rank {place.rank}] " if place.rank else ""
