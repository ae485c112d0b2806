"""A job that is started again: whether it should be, without a cluster, and its wait for its former self."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

import requeue
from fcmae.cli import run_command
from fcmae.errors import TryAgain, UsageError
from fcmae.schema import Config
from fcmae.train.lock import locked
from fcmae.train.lost import lost
from slurm_cluster import ROOT
from small_runs import CONFIG, command, environment, make_pictures, run

HOLDER = """
import sys
from pathlib import Path
from fcmae.train.lock import locked
held = locked(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Call it to have a file locked by another process, of job 7's first start, until its stdin is closed."""
    started = []

    def hold(path):
        env = {**os.environ, "SLURM_JOB_ID": "7"}
        env.pop("SLURM_RESTART_COUNT", None)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def test_a_requeued_job_waits_for_its_former_self_and_no_other_does(tmp_path, monkeypatch, capsys, holder):
    path = tmp_path / ".lock"
    other = holder(path)
    for job, restarts in (("8", "1"), ("7", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(UsageError, match="another process is running in .* SLURM job 7"):
            locked(path, wait=60)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(TryAgain, match="former start .* SLURM job 7"):  # whose machine is lost: no error of the user's
        locked(path, wait=0)
    threading.Timer(0.5, other.stdin.close).start()
    with locked(path, wait=60):
        assert path.read_text().endswith(", SLURM job 7\n") and f"process {os.getpid()}" in path.read_text()
    assert "waiting for this job's former start" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_goes_on_from_what_its_former_self_saved_last(tmp_path, holder):
    """Its last checkpoint appears while the new start waits for the lock; that start reads it, and keeps it."""
    source, out = f"data.source={make_pictures(tmp_path / 'pictures')}", tmp_path / "run"
    (tmp_path / "config.yaml").write_text(CONFIG)
    arguments = (tmp_path / "config.yaml", source, f"out={out}", "checkpoint.every=2", "checkpoint.keep_last=3")
    run(*arguments, "train.steps=6")
    (out / "encoder.safetensors").unlink()
    last, aside = out / "checkpoints" / "step_000000006.pt", tmp_path / "aside.pt"
    shutil.move(last, aside)
    other = holder(out / ".lock")
    env = {**environment(), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    with subprocess.Popen(
        command(*arguments, "train.steps=6"), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as again:
        lines = iter(again.stdout.readline, "")
        assert any("waiting for this job's former start" in line for line in lines)
        shutil.move(aside, last)
        other.stdin.close()
        assert "going on from step 6 of 6" in again.stdout.read()
    assert again.returncode == 0 and last.exists() and (out / "encoder.safetensors").exists()


def test_a_rank_that_ran_out_of_patience_with_its_former_self_asks_to_be_started_again(tmp_path):
    """Status 75 through every layer of a command, which a job's script takes for a reason to requeue."""

    def refuse(config):
        raise TryAgain("not yet")

    (tmp_path / "config.yaml").write_text(CONFIG)
    assert run_command("fcmae.pretrain", Config, refuse, [str(tmp_path / "config.yaml")]) == 75


def test_starts_without_a_new_checkpoint_are_counted(tmp_path):
    run, kept = tmp_path / "run", tmp_path / "5_restarts.json"
    folder = run / "arms" / "a" / "checkpoints"
    folder.mkdir(parents=True)
    counted = [requeue.starts_without_progress(run, kept)]
    for name in ("step_000000003.pt", None, None, "step_000000010.pt"):
        if name:
            (folder / name).touch()
        counted.append(requeue.starts_without_progress(run, kept))
    assert counted == [1, 0, 1, 2, 0]


def test_a_rank_that_failed_is_not_tried_again(tmp_path):
    (tmp_path / "12_3_1_log.out").write_text("a line\nfcmae.pretrain: error: [rank 1] no such thing\n\n")
    (tmp_path / "12_3_1_failed").write_text("2\n")
    (tmp_path / "12_3_10_failed").write_text("1\n")
    env = {**os.environ, "SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    command = [sys.executable, str(ROOT / "slurm" / "requeue.py"), "--run", str(tmp_path), "--logs", str(tmp_path)]
    done = subprocess.run(
        [*command, "--status", "143", "--restarts", "3"], env=env, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and "rank 1: fcmae.pretrain: error: [rank 1] no such thing\n" in done.stdout
    assert "not requeued" in done.stdout


def test_which_errors_mean_that_others_are_gone():
    for gone in (
        RuntimeError("[.../gloo/transport/tcp/pair.cc:545] Connection closed by peer"),
        torch.distributed.DistNetworkError("no route"),
        RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
        RuntimeError("DataLoader timed out after 1800 seconds"),
    ):
        assert lost(gone).status == TryAgain.status
    assert lost(RuntimeError("shapes do not match")) is None and lost(ValueError("gloo")) is None


def test_the_end_of_a_script_is_for_python_3_6():
    text = (ROOT / "slurm" / "requeue.py").read_text()
    tree = ast.parse(text, feature_version=(3, 6))
    imported = {a.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    assert imported <= {"argparse", "json", "os", "subprocess", "sys", "time", "Path"}  # not `annotations`, of 3.7
    named = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    assert not named & {"capture_output", "text", "missing_ok"}  # later than 3.6


def test_when_slurm_does_not_answer_the_run_is_not_given_up_silently(tmp_path, monkeypatch, capsys):
    """Neither squeue nor scontrol is there to be had; srun itself had failed, no rank had said anything."""
    for key in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "15")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(requeue, "PAUSE", 0)
    line = ["requeue", "--run", str(tmp_path), "--logs", str(tmp_path), "--status", "1", "--restarts", "2"]
    monkeypatch.setattr(sys, "argv", line)
    assert requeue.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0].startswith("slurm: squeue does not answer: ")
    assert said[1] == "slurm: requeued after status 1" and said[2].startswith("slurm: not requeued after all, SLURM re")
    assert requeue.main() == 1 and "2 starts in a row wrote no new checkpoint" in capsys.readouterr().out
