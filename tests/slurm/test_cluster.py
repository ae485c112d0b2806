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
from small_runs import CONFIG, assert_same_run, make_pictures, metrics, run

pytestmark = pytest.mark.slurm

STEPS = 120
# On a slow machine a start may be told to end before its first step.
LIMIT = ("--timeout", "1", "--signal-delay", "5", "--restarts", "6")
TWO_NODES = ("--nodes", "2", "--cpus-per-task", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A config of 8 images a step, whatever the number of ranks, and its images."""
    folder = tmp_path_factory.mktemp("cluster")
    make_pictures(folder / "pictures")
    config = CONFIG.replace("steps: 60, batch_size: 8", f"steps: {STEPS}, batch_size: 4, effective_batch: 8")
    config = config.replace("lr: 1.0e-3", "lr: 5.0e-4")  # at twice that, rounding grows to 1e-2 in a hundred steps
    (folder / "config.yaml").write_text(config)
    return folder


def arguments(place, out, *more: str) -> list[str]:
    return ["pretrain", str(place / "config.yaml"), f"data.source={place / 'pictures'}", f"out={out}", *more]


def steps_done(out) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def log(out, job: str, rank: int) -> str:
    return (out / "slurm" / f"{job}_{rank}_log.out").read_text()


@pytest.fixture(autouse=True)
def nothing_left(request):
    """A test that fails leaves no job to the next."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").run("scancel", "--user=root")


@pytest.fixture(scope="module")
def whole(cluster, place):
    """The uninterrupted run on two nodes."""
    job = cluster.submit(*arguments(place, place / "whole"), *TWO_NODES)
    assert cluster.wait(job) == ["COMPLETED"], log(place / "whole", job, 0)
    return place / "whole"


def test_two_nodes_follow_one_process(place, whole, tmp_path):
    assert "8 = 4 x 1 accumulated x 2 processes" in "".join(
        p.read_text() for p in (whole / "slurm").glob("*_0_log.out")
    )
    run(place / "config.yaml", f"data.source={place / 'pictures'}", f"out={tmp_path / 'one'}", "train.batch_size=8")
    one, two = metrics(tmp_path / "one"), metrics(whole)
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    close(torch.tensor([r["loss"] for r in two]), torch.tensor([r["loss"] for r in one]), 1e-5)


def test_preempted_three_times_and_killed_once_it_ends_the_same(cluster, place, whole, tmp_path):
    out, seed = tmp_path / "run", random.randrange(2**32)
    print(f"random moments of seed {seed}")  # pytest shows it when the test fails
    rng = random.Random(seed)
    job = cluster.submit(*arguments(place, out, "checkpoint.every=20", "data.workers=1"), *TWO_NODES)
    preemptions = [
        lambda: cluster.run("scancel", "--signal=USR1", job),
        lambda: cluster.run("scancel", "--signal=USR2", job),
        lambda: cluster.run("scontrol", "requeue", job),
    ]
    rng.shuffle(preemptions)
    interruptions = [*preemptions, lambda: cluster.kill_rank(job, rng.randrange(2))]
    for number, interrupt in enumerate(interruptions):
        goal = steps_done(out) + rng.randint(3, 15)
        assert cluster.until(job, lambda goal=goal: steps_done(out) >= goal, 120), log(out, job, 0)
        time.sleep(rng.random() * 0.1)
        interrupt()
        again = lambda number=number: cluster.restarts(job) == number + 1  # noqa: E731
        assert cluster.until(job, again, 60), log(out, job, 0)
    assert cluster.wait(job) == ["COMPLETED"], log(out, job, 0)
    assert_same_run(out, whole)
    said = log(out, job, 0)
    assert said.count("going on from step") == 4 and said.count("the same command goes on from there") == 3


def test_out_of_time_it_is_requeued_and_finishes(cluster, place, tmp_path):
    out = tmp_path / "run"
    # More than the limit, so that no one start can be enough, however early SLURM sends its signal.
    longer = ["train.steps=null", "train.seconds=62", "log.print_every=50", "checkpoint.every=100000"]
    job = cluster.submit(*arguments(place, out, *longer), *TWO_NODES, *LIMIT)
    assert cluster.wait(job, 500) == ["COMPLETED"], log(out, job, 0)
    assert cluster.restarts(job) >= 1
    said = log(out, job, 0)
    assert "signal 12: saved at step" in said and "slurm: requeued after status 140" in said
    assert "going on from step" in said and (out / "encoder.safetensors").exists()
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_a_config_error_is_one_line_and_the_end(cluster, place, tmp_path):
    out = tmp_path / "run"
    job = cluster.submit(*arguments(place, out, "train.btch_size=4"), *TWO_NODES)
    assert cluster.wait(job) == ["FAILED"]
    lines = [line for line in log(out, job, 0).splitlines() if "fcmae.pretrain: error:" in line]
    assert len(lines) == 1 and "unknown setting 'train.btch_size'" in lines[0]  # of the rank that was first
    assert "not requeued" in log(out, job, 0) and cluster.restarts(job) == 0
    assert "Traceback" not in log(out, job, 0) + log(out, job, 1)
    assert "ExitCode=2:0" in cluster.run("scontrol", "show", "job", job)
    assert [p.name for p in out.iterdir()] == ["slurm"]


def test_a_rank_that_fails_takes_the_others_down_with_its_message(cluster, place, tmp_path):
    """Rank 1 alone has a package that breaks while the others train."""
    out = tmp_path / "run"
    broken = tmp_path / "profile.yaml"
    (tmp_path / "breaks").mkdir()
    (tmp_path / "breaks" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('SLURM_PROCID') == '1' and 'SLURM_STEP_ID' in os.environ:\n"
        "    import torch.optim\n"
        "    def step(*_, **__): raise ArithmeticError('nothing adds up on this node')\n"
        "    torch.optim.AdamW.step = step\n"
    )
    broken.write_text(f"setup: [export PYTHONPATH={tmp_path / 'breaks'}]\n")
    job = cluster.submit(*arguments(place, out), *TWO_NODES, "--profile", str(broken))
    assert cluster.wait(job) == ["FAILED"]
    assert "slurm: rank 1: fcmae.pretrain: error: [rank 1] ArithmeticError: nothing adds up" in log(out, job, 0)
    assert "not requeued" in log(out, job, 0) and cluster.restarts(job) == 0


def test_a_step_that_does_not_start_is_tried_again_but_not_for_ever(cluster, place, tmp_path):
    """srun itself fails: no rank ever says anything."""
    (tmp_path / "profile.yaml").write_text(f"python: {tmp_path / 'none'}\nrestarts: 2\n")
    out = tmp_path / "run"
    job = cluster.submit(*arguments(place, out), *TWO_NODES, "--profile", str(tmp_path / "profile.yaml"))
    assert cluster.wait(job, 180) == ["FAILED"]
    assert cluster.restarts(job) == 1 and "2 starts in a row wrote no new checkpoint" in log(out, job, 0)


def test_what_sbatch_refuses_is_one_line(cluster, place, tmp_path):
    said = cluster.refused(*arguments(place, tmp_path / "run"), "--partition", "none")
    assert said.startswith("submit: error: ") and said.count("\n") == 1 and "partition" in said


def test_an_array_of_three_overrides_is_three_runs(cluster, place, tmp_path):
    sweep, lines = tmp_path / "sweep", tmp_path / "lines.txt"
    longer = "train.steps=null train.seconds=62 log.print_every=100"  # than the limit
    lines.write_text(
        f"# learning rates\ntrain.lr=1e-3 {longer}\ntrain.lr=2e-3\n"
        f"train.lr=1e-3 {longer} seed=1 out={tmp_path / 'own'}\n"
    )
    short = ["train.steps=6", "train.effective_batch=4", "train.warmup_epochs=0", "checkpoint.every=100000"]
    job = cluster.submit(*arguments(place, sweep, *short), "--array", str(lines), "--cpus-per-task", "1", *LIMIT)
    assert cluster.wait(job, 500) == ["COMPLETED"] * 3, log(sweep, f"{job}_0", 0) + log(sweep, f"{job}_2", 0)
    # Each out of time for itself; the last element's own number is the whole array's.
    said = [log(sweep, f"{job}_{number}", 0) for number in range(3)]
    assert [text.count("slurm: requeued after status 140") >= 1 for text in said] == [True, False, True]
    assert ["going on from step" in text for text in said] == [True, False, True]
    for number, text in enumerate(said):
        assert text.count("slurm: requeued") == cluster.restarts(f"{job}_{number}")
    runs = [sweep / "0", sweep / "1", tmp_path / "own"]
    losses = [[row["loss"] for row in metrics(out)][:6] for out in runs]
    assert [len(x) for x in losses] == [6, 6, 6] and len(metrics(runs[1])) == 6
    assert losses[0] != losses[1] and losses[0] != losses[2]
    assert all((sweep / "slurm" / f"{job}_{i}_0_log.out").is_file() for i in range(3))
    shown = watch(sweep)
    assert f"{sweep / '0'}: job {job}_0 done" in shown and f"{sweep / '1'}: job {job}_1 done, step 6 of 6" in shown


def test_watch_tells_where_a_job_stands_and_a_second_copy_is_refused(cluster, place, tmp_path):
    out = tmp_path / "run"
    job = cluster.submit(*arguments(place, out, "train.steps=100000"), *TWO_NODES)
    assert cluster.until(job, lambda: steps_done(out) >= 5, 120)
    shown = watch(out, env=cluster.env)
    assert f"job {job} running on n[1-2]" in shown and "of 100000" in shown and "img/s" in shown and " left" in shown
    assert "[rank 0] step " in shown  # the other has nothing to say: tests/test_slurm_watch.py
    second = cluster.submit(*arguments(place, out, "train.steps=100000"), *TWO_NODES)
    assert cluster.wait(second) == ["FAILED"]
    said = log(out, second, 0)
    assert f"SLURM job {job}" in said and said.count("another process is running in") == 1
    shown = watch(out, env=cluster.env)  # not hidden by the one that was refused
    assert f"job {job} running on n[1-2]" in shown and "another process" not in shown
    cluster.run("scancel", job)
    assert cluster.wait(job) == ["CANCELLED"] and cluster.restarts(job) == 0
    assert "saved at step" in log(out, job, 0)


def test_local_is_the_same_run(place, whole, tmp_path):
    out = tmp_path / "run"
    done = submit(*arguments(place, out), "--local", "--tasks-per-node", "2", "--cpus-per-task", "1")
    assert done.returncode == 0, done.stderr
    assert_same_run(out, whole)
    assert " done, step 120 of 120" in watch(out)


def watch(run, env=None) -> str:
    """What slurm/watch.py prints."""
    command = [sys.executable, str(ROOT / "slurm" / "watch.py"), str(run)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
