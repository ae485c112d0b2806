"""slurm/submit.py --local: the same runs here, and what ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

import here
import submit
from options import Resources
from slurm_cluster import ROOT
from slurm_cluster import submit as submitted
from small_runs import CONFIG, assert_same_run, environment, make_pictures, metrics, run


@pytest.fixture
def local(tmp_path):
    """What submit.py is told for a small run of two ranks here."""
    (tmp_path / "config.yaml").write_text(CONFIG.replace("steps: 60, batch_size: 8", "steps: 6, batch_size: 4"))
    source = make_pictures(tmp_path / "pictures")
    return [
        "pretrain", str(tmp_path / "config.yaml"), f"data.source={source}", f"out={tmp_path / 'run'}",
        "--local", "--tasks-per-node", "2", "--cpus-per-task", "1",
    ]  # fmt: skip


def test_local_is_the_run_that_torchrun_starts(local, tmp_path):
    (tmp_path / "profile.yaml").write_text("setup: [export FROM_PROFILE=1]\n")
    done = submitted(*local, "--profile", str(tmp_path / "profile.yaml"))
    assert done.returncode == 0, done.stderr
    run(tmp_path / "config.yaml", local[2], f"out={tmp_path / 'other'}", processes=2)
    assert_same_run(tmp_path / "run", tmp_path / "other")
    assert not list((tmp_path / "run" / "slurm").glob("*_running"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["error", "killed"])
def test_a_rank_that_ends_ends_the_others_here_too(local, tmp_path, how):
    """Rank 1 fails, or dies, before it meets rank 0, which would wait for it for half an hour."""
    act = {"error": "raise ArithmeticError('nothing adds up')", "killed": "os.kill(os.getpid(), 9)"}[how]
    (tmp_path / "breaks").mkdir()
    (tmp_path / "breaks" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('SUBMITIT_LOCAL_GLOBALID') == '1':\n"
        "    import torch.distributed as dist\n"
        f"    def meet(*_, **__): {act}\n"
        "    dist.init_process_group = meet\n"
    )
    (tmp_path / "profile.yaml").write_text(f"setup: [export PYTHONPATH={tmp_path / 'breaks'}]\n")
    done = submitted(*local, "--profile", str(tmp_path / "profile.yaml"))  # gives up after 5 minutes
    assert done.returncode == 1 and "did not end well" in done.stderr
    (log,) = (tmp_path / "run" / "slurm").glob("*_0_log.out")
    assert "fcmae.pretrain: error: rank 1 ended" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_saves_a_run_that_is_here(local, tmp_path, number):
    """Ctrl-C reaches every process of the terminal, SIGTERM the command alone, also with a profile's setup."""
    (tmp_path / "profile.yaml").write_text("setup: [export FROM_PROFILE=1]\n")
    out = tmp_path / "run"
    started = [sys.executable, str(ROOT / "slurm" / "submit.py"), *local, "train.steps=100000"]
    with subprocess.Popen(
        [*started, "--profile", str(tmp_path / "profile.yaml")], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env=environment(), text=True, start_new_session=True,
    ) as job:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 3:
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.1)
        if number == signal.SIGINT:
            os.killpg(job.pid, number)
        else:
            job.send_signal(number)
        said = job.communicate(timeout=120)[1]
    assert job.returncode == 128 + number and "is saved; the same command goes on" in said, said
    assert list((out / "checkpoints").glob("step_*.pt"))


def test_the_users_gpus_are_the_runs(local, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5,3,1")
    found = here.python_here(Resources(setup=["export A=1"]), 2)
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['A'])"
    assert (
        subprocess.run(["bash", "-c", f'{found} -c "{code}"'], capture_output=True, text=True).stdout == "GPU-5,3 1\n"
    )
    assert submit.main([*local, "--gpus-per-node", "4"]) == 2
    assert "CUDA_VISIBLE_DEVICES=GPU-5,3,1 names 3" in capsys.readouterr().err
