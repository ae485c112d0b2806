"""Loader processes that die, hang or do not begin."""

import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from fcmae.cli import run_command
from fcmae.data import loader
from fcmae.data.loader import PatientLoader
from fcmae.downstream import representation
from fcmae.schema import Config
from small_runs import CONFIG, environment


class Numbers(torch.utils.data.Dataset):
    """A dataset for a loader."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.full((1000,), float(i))


class Torn(Numbers):
    """Its first process dies in the middle of a word to the one that asks."""

    def __getitem__(self, i: int) -> torch.Tensor:
        if i == 200 and torch.utils.data.get_worker_info().id == 0:
            time.sleep(1)  # what it said before has been read
            frame = sys._getframe()
            while "data_queue" not in frame.f_locals:
                frame = frame.f_back
            os.write(frame.f_locals["data_queue"]._writer.fileno(), struct.pack("!i", 1 << 20) + b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def training(dataset: torch.utils.data.Dataset | None = None) -> PatientLoader:
    return PatientLoader(dataset or Numbers(), 2, num_workers=2, persistent_workers=True)


def torn() -> PatientLoader:
    return training(Torn())


def validation() -> PatientLoader:
    return representation.loader(Numbers(), 2, 2)


def ran(program: str) -> subprocess.CompletedProcess:
    """A Python program that may import this file."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parent, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "number", "patience", "words"),
    [
        (training, signal.SIGKILL, 600, "a loader process was killed"),
        (torn, signal.SIGCONT, 600, "a loader process was killed"),
        (training, signal.SIGSTOP, 3, "no batch came .* in 3 s"),
        (validation, signal.SIGSTOP, 3, "no batch came .* in 3 s"),
    ],
)
def test_a_loader_process_that_dies_or_hangs_ends_the_run_in_one_line(
    tmp_path, monkeypatch, capfd, make, number, patience, words
):
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setattr(loader, "PATIENCE", patience)
    monkeypatch.setattr(loader, "CERTAIN", 2)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def run(config):
        batches = iter(make())
        next(batches)
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)
        for _ in batches:
            pass

    assert run_command("fcmae.pretrain", Config, run, [str(tmp_path / "config.yaml")]) == 75
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fcmae.pretrain: error: ") and re.search(words, line), line
    assert not multiprocessing.active_children()
    assert json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"] == line


def test_a_loader_process_of_a_killed_program_says_nothing():
    """Killed while it asks for the memory of a batch, at the answer to the other's challenge."""
    program = """
        import multiprocessing.connection as line, os, signal
        from test_loader_faults import training
        line.answer_challenge = lambda *_: (print("asked", flush=True), os.kill(os.getpid(), signal.SIGKILL))
        next(iter(training()))
    """
    done = ran(program)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGKILL, "asked\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
@pytest.mark.parametrize(
    ("make", "seconds", "hang", "found", "told"),
    [
        ("training", (2, 60), "forks == 2", "[0.0, 1.0] 4 forks, 2 left", (2,)),
        ("validation", (2, 60), "forks == 2", "[0.0, 1.0] 4 forks, 2 left", (2,)),
        ("training", (2, 1), "True", "a loader process did not begin, forked 2 times in 3 s; is the machine", (2, 1)),
    ],
)
def test_a_loader_process_that_hangs_at_its_fork_is_forked_again(make, seconds, hang, found, told):
    """As one does that copied a lock which was held (python/cpython#112275): before any line of Python of its own."""
    program = """
        import multiprocessing, os, time
        import test_loader_faults
        from fcmae.data import loader
        from fcmae.train.lost import lost
        multiprocessing.set_start_method("fork")
        loader.BEGINNING, forks = SECONDS, 0
        def count():
            global forks
            forks += 1
        os.register_at_fork(before=count, after_in_child=lambda: HANG and time.sleep(1000))
        try:
            batches = iter(test_loader_faults.MAKE())
            print(next(batches)[:, 0].tolist(), forks, "forks,", len(multiprocessing.active_children()), "left")
        except RuntimeError as error:
            print(lost(error))
            assert not multiprocessing.active_children()
    """
    for word, value in (("MAKE", make), ("SECONDS", f"{seconds}"), ("HANG", f"({hang})")):
        program = program.replace(word, value)
    done = ran(program)
    assert done.returncode == 0 and done.stdout.startswith(found), (done.stdout, done.stderr)
    warning = "warning: a loader process did not begin in {} s; all are forked again\n"
    assert done.stderr == "".join(warning.format(seconds) for seconds in told)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_ctrl_c_while_a_loader_process_does_not_begin():
    program = """
        import multiprocessing, os, signal, threading, time
        import test_loader_faults
        multiprocessing.set_start_method("fork")
        os.register_at_fork(after_in_child=lambda: (signal.signal(signal.SIGTERM, signal.SIG_IGN), time.sleep(1000)))
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()
        iter(test_loader_faults.validation())
    """
    done = ran(program)
    assert done.returncode == -signal.SIGINT and done.stderr.endswith("KeyboardInterrupt\n"), done.stderr
