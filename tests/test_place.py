"""Which process of how many this is, under SLURM, torchrun and submitit; and that all run the same."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from fcmae.errors import UsageError
from fcmae.train.agreement import check_alike, code_version
from fcmae.train.place import Place, find_place, first_host, tasks_on_node


def test_a_process_finds_its_place():
    step = {"SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "6"}
    step |= {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_CPUS_PER_TASK": "3"}
    assert find_place(step) == Place("SLURM", 5, 6, 1, 2, "tcp://gpu07:22345", 3)
    assert find_place(step | {"SLURM_RESTART_COUNT": "1"}).address == "tcp://gpu07:22446"
    # Not one core where SLURM says nothing of cores.
    assert find_place({k: v for k, v in step.items() if k != "SLURM_CPUS_PER_TASK"}).cores is None
    # In a batch script, which srun did not start: one process, whatever SLURM_NTASKS says.
    assert find_place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == Place("none")
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert find_place(step | torchrun) == Place("torchrun", 0, 2, 0, 2)
    local = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_JOB_ID": "77"}
    assert find_place(local) == Place("submitit", 1, 2, 1, 2, "tcp://127.0.0.1:20077")
    assert find_place({}) == Place("none")


def test_a_shell_of_srun_with_a_terminal_is_alone_and_the_steps_it_starts_are_not():
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_PTY_PORT": "40000"}
    step |= {"SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": "5"}
    ask = [sys.executable, "-c", f"from fcmae.train.place import find_place; print(find_place({step}).size)"]
    in_terminal = [sys.executable, "-c", f"import pty; pty.spawn({ask})"]
    for line, size in ((in_terminal, "1"), (ask, "4")):
        done = subprocess.run(
            line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, start_new_session=True
        )
        assert re.findall(r"\d", done.stdout) == [size], done


def test_lists_as_slurm_writes_them():
    hosts = {"n1": "n1", "n[1-2]": "n1", "n[03,7-9],m1": "n03", "a,b": "a", "r1n[2-3].site.org": "r1n2.site.org"}
    assert {text: first_host(text) for text in hosts} == hosts
    assert [tasks_on_node("4(x2),3", node) for node in range(3)] == [4, 4, 3]


def test_ranks_that_differ_are_named():
    one = ("0.1.0, sources aa", {"train": {"steps": 3}})
    check_alike([one, one, one])
    with pytest.raises(UsageError, match=r"^ranks 1, 2 have other code \(fcmae 0.1.0, sources bb\) than rank 0"):
        check_alike([one, ("0.1.0, sources bb", one[1]), ("0.1.0, sources bb", one[1])])
    with pytest.raises(UsageError, match=r"^rank 2 has other settings than rank 0 \(train.steps: 3 -> 4\)"):
        check_alike([one, one, (one[0], {"train": {"steps": 4}})])
    assert re.fullmatch(r"\d+\.\d+\.\d+, sources [0-9a-f]{12}", code_version())
