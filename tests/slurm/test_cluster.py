"""Jobs on a real SLURM of two nodes: submitted, preempted, killed, out of time, wrong; and the same without SLURM."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest
import torch

from helpers import close
from slurm_cluster import ROOT, submit
from small_runs import CONFIG, assert_same_run, final_state, make_pictures, metrics, run

pytestmark = pytest.mark.slurm

STEPS = 150
TWO_NODES = ("--nodes", "2", "--cpus-per-task", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A config of 8 images a step, whatever the number of ranks, and its images."""
    folder = tmp_path_factory.mktemp("cluster")
    make_pictures(folder / "pictures")
    config = CONFIG.replace("steps: 60, batch_size: 8", f"steps: {STEPS}, batch_size: 4, effective_batch: 8")
    (folder / "config.yaml").write_text(config)
    return folder


def arguments(place, out, *more: str) -> list[str]:
    return ["pretrain", str(place / "config.yaml"), f"data.source={place / 'pictures'}", f"out={out}", *more]


def steps_done(out) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def log(out, job: str, rank: int) -> str:
    return (out / "slurm" / f"{job}_{rank}_log.out").read_text()


@pytest.fixture(scope="module")
def whole(cluster, place):
    """The uninterrupted run on two nodes."""
    job = cluster.submit(*arguments(place, place / "whole"), *TWO_NODES)
    assert cluster.wait(job) == ["COMPLETED"], log(place / "whole", job, 0)
    return place / "whole"


def test_two_nodes_follow_one_process(place, whole, tmp_path):
    assert "8 = 4 x 1 accumulated x 2 processes" in "".join(p.read_text() for p in (whole / "slurm").glob("*_0_log.out"))
    run(place / "config.yaml", f"data.source={place / 'pictures'}", f"out={tmp_path / 'one'}", "train.batch_size=8")
    one, two = metrics(tmp_path / "one"), metrics(whole)
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    close(torch.tensor([r["loss"] for r in two]), torch.tensor([r["loss"] for r in one]), 1e-5)


def test_preempted_three_times_and_killed_once_it_ends_the_same(cluster, place, whole, tmp_path):
    out, rng = tmp_path / "run", random.Random()
    job = cluster.submit(*arguments(place, out, "checkpoint.every=20"), *TWO_NODES)
    preemptions = [
        lambda: cluster.run("scancel", "--signal=USR1", job),
        lambda: cluster.run("scancel", "--signal=USR2", job),
        lambda: cluster.run("scontrol", "requeue", job),
    ]
    rng.shuffle(preemptions)
    interruptions = [*preemptions, lambda: cluster.kill_rank(job, rng.randrange(2))]
    for number, interrupt in enumerate(interruptions):
        goal = steps_done(out) + rng.randint(5, 20)
        assert cluster.until(job, lambda goal=goal: steps_done(out) >= goal, 120), log(out, job, 0)
        time.sleep(rng.random() * 0.1)
        interrupt()
        again = lambda number=number: cluster.restarts(job) == number + 1  # noqa: E731
        assert cluster.until(job, again, 60), log(out, job, 0)
    assert cluster.wait(job) == ["COMPLETED"], log(out, job, 0)
    assert_same_run(out, whole)
    said = log(out, job, 0)
    assert said.count("going on from step") == 4 and said.count("the same command goes on from there") == 3
