"""Disks that take no more, processes that die or hang: one line, whole files, nothing left running."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from fcmae.cli import run_command
from fcmae.errors import UsageError
from fcmae.files import write_whole
from fcmae.schema import Config, LogConfig
from fcmae.train.log import Log, MetricsFile
from fcmae.train.run_folder import RunFolder
from fcmae.train.state import Progress
from small_runs import CONFIG, command, environment


@contextlib.contextmanager
def no_file_beyond(size: int):
    """As on a full disk, the system takes part of what is written, and then refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 5000, 100_000, 300_000])
def test_why_a_checkpoint_could_not_be_written(tmp_path, size):
    path = tmp_path / "step.pt"
    path.write_text("the one before")
    with no_file_beyond(size), pytest.raises(UsageError, match=f"^could not write {path}: File too large; free some"):
        write_whole(path, lambda file: torch.save({str(i): torch.randn(10_000) for i in range(10)}, file))
    assert path.read_text() == "the one before" and list(tmp_path.iterdir()) == [path]


def test_another_error_in_writing_is_not_the_disk_s(tmp_path):
    def dies(file):
        raise RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        write_whole(tmp_path / "a", dies)
    assert not list(tmp_path.iterdir())


def test_a_log_that_finds_no_space_says_so_and_goes_on_later(tmp_path):
    path, row = tmp_path / "metrics.jsonl", {"step": 1, "loss": 0.25}
    file = MetricsFile(path, 0)
    with no_file_beyond(100), pytest.raises(UsageError, match=f"could not write {path}: File too large"):
        for step in range(9):
            file.write({**row, "step": step})
    file.close()
    assert path.stat().st_size == 100  # the last line is cut
    again = MetricsFile(path, 9)
    again.write({**row, "step": 9})
    again.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 9]


def test_tensorboard_and_the_names_of_bad_images_find_no_space(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    configs = LogConfig(), LogConfig(tensorboard=False)
    log, other = (Log(RunFolder(tmp_path), config, Progress(), None, True, "") for config in configs)
    monkeypatch.setattr(other, "say", lambda line: None)  # standard output is a file here
    with no_file_beyond(200):
        with pytest.raises(UsageError, match=f"could not write {tmp_path / 'tensorboard'}: File too large"):
            for step in range(500):
                log.scalars({"loss": 1.0}, step)
                time.sleep(0.01)
        with pytest.raises(UsageError, match="could not write .*bad_images.txt: File too large"):
            other.bad_images([f"{number:03d}.jpg: broken" for number in range(99)])
        with pytest.raises(UsageError, match="tensorboard: File too large"):
            log.close()
    assert "Traceback" not in capfd.readouterr().err  # of TensorBoard's thread


def test_what_a_kill_left_of_a_checkpoint_goes_with_the_next_start(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for left in (folder.checkpoints / ".step_000000007.part.pt", folder.checkpoints / ".step_000000009.part.pt"):
        left.write_bytes(b"half")
    kept = folder.checkpoints / "step_000000006.pt"
    kept.write_bytes(b"whole")
    folder.claim(Config()).close()
    assert list(folder.checkpoints.iterdir()) == [kept]


def test_ctrl_c_before_training_is_one_line(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(CONFIG)

    def run(config):
        raise KeyboardInterrupt

    assert run_command("fcmae.pretrain", Config, run, [str(tmp_path / "config.yaml")]) == 130
    assert capsys.readouterr().err == "fcmae.pretrain: interrupted\n"


@pytest.mark.slow
def test_a_rank_whose_other_never_begins_does_not_wait_long(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from fcmae import launch
        launch.STARTING = 0.2
        Path(sys.argv[1], "7_0_running").write_text("1")
        launch.Launch("pretrain", ())._await_all(Path(sys.argv[1]), "7")
    """
    place = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_JOB_ID": "7"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        env={**environment(), **place}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 75 and "rank 1 did not begin in 0.2 s" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_rank_is_told_to_end_when_its_launcher_is_killed():
    child = """
        import os, threading, time
        from fcmae.train import distributed
        threading.Thread(target=distributed._follow, args=(os.getppid(),), daemon=True).start()
        print(os.getpid(), flush=True)
        time.sleep(60)
    """
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen(
        [sys.executable, "-c", parent, textwrap.dedent(child)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as launcher:
        pid = int(launcher.stdout.readline())
        launcher.kill()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.slow
def test_torchrun_s_report_ends_with_what_was_wrong(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    done = subprocess.run(
        command(tmp_path / "config.yaml", f"data.source={tmp_path / 'none'}", f"out={tmp_path / 'out'}", processes=2),
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"traceback : fcmae.pretrain: error: .*does not exist", done.stderr.splitlines()[-2]), done.stderr
