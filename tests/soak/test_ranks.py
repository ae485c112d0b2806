"""Loader processes and ranks that are killed, stopped or slowed: a run ends in bounded time and leaves no process
behind, or goes on; either way its result is the undisturbed one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from fcmae.errors import TryAgain
from fcmae.train.checkpoint import steps_in
from slurm_cluster import ROOT
from small_runs import CONFIG, assert_same_run, environment, make_pictures
from soak.crashes import check_checkpoints, check_whole, last_step
from soak.processes import MARK, children, living, ranks, send, until
from soak.starter import Started

pytestmark = pytest.mark.soak

SEED = 0
BOUND = 180  # seconds for a run to end after a fault, on a busy machine; half an hour is what ranks wait for another
STEPS = 40
HURRIED_RANKS = """import datetime, sys
from fcmae import pretrain
from fcmae.train import distributed
distributed.PATIENCE = datetime.timedelta(seconds=15)
sys.exit(pretrain.main())
"""
HURRIED = "import sys, fcmae.data.loader as l; l.PATIENCE = 15; import fcmae.pretrain as p; sys.exit(p.main())"


class Place:
    """Images, a config, the results of undisturbed runs, and processes that all have a mark."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.mark = folder, 0, uuid.uuid4().hex
        (folder / "config.yaml").write_text(
            CONFIG.replace("steps: 60, batch_size: 8", f"steps: {STEPS}, batch_size: 4")
        )
        self.given = [str(folder / "config.yaml"), f"data.source={make_pictures(folder / 'pictures')}"]
        self._whole: dict[int, Path] = {}

    def start(self, out: Path, *settings: str, processes: int = 1, code: str | None = None) -> Started:
        """A pretraining run, by torchrun if it has several processes. code: of a script in its place."""
        self.count += 1
        started = Started(self.folder / f"start{self.count}")
        started.folder.mkdir()
        begin = ["-m", "fcmae.pretrain"]
        if code:
            (started.folder / "script.py").write_text(code)
            begin = [str(started.folder / "script.py")]
        if processes > 1:
            begin = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *begin]
        command = [sys.executable, *begin, *self.given, "checkpoint.every=3", f"out={out}", *settings]
        with open(started.folder / "stdout", "wb") as said, open(started.folder / "stderr", "wb") as errors:
            process = subprocess.Popen(command, env={**environment(), MARK: self.mark}, stdout=said, stderr=errors)
        started.pid, started.process = process.pid, process.wait
        return started

    def whole(self, processes: int) -> Path:
        """The undisturbed run of so many processes."""
        if processes not in self._whole:
            out = self.folder / f"whole{processes}"
            started = self.start(out, processes=processes)
            assert started.wait() == 0, started.errors()[-2000:]
            self._whole[processes] = out
        return self._whole[processes]

    def ended(self, started: Started) -> int:
        """The status of a run that ends in time and leaves no process behind."""
        status = started.wait(BOUND)
        until(lambda: not living(self.mark), 30, "processes are left", 0.1)
        return status


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """See Place; nothing that it started outlives the tests."""
    place = Place(tmp_path_factory.mktemp("ranks"))
    yield place
    for pid in living(place.mark):
        send(pid, signal.SIGKILL)


def steps_on(out: Path, started: Started, rng: random.Random) -> int:
    """Wait until a run is some steps further, and a little; the step it had come to."""
    goal = min(last_step(out) + rng.randint(2, 6), STEPS - 3)
    until(lambda: last_step(out) >= goal or started.ended(), BOUND, f"step {goal}: {started.errors()}")
    time.sleep(rng.random() * 0.03)
    assert not started.ended(), started.errors()
    return goal


def check(out: Path) -> int:
    """The folder is whole; the steps that the run loses."""
    check_whole(out)
    return check_checkpoints(out, [], 3)


def to_end(place: Place, out: Path, processes: int) -> None:
    """The same command goes on, and comes to what the undisturbed run came to."""
    held = steps_in(out / "checkpoints")
    started = place.start(out, f"data.workers={2 if processes == 1 else 1}", processes=processes)
    assert place.ended(started) == 0, started.errors()[-2000:]
    assert ("going on from step" in started.said()) == bool(held)
    assert_same_run(out, place.whole(processes))


def test_a_killed_loader_process_ends_the_run_in_one_line(place, tmp_path, often, figures):
    rng, lost, took, count = random.Random(f"{SEED} loader"), [], [], often(12, 1)
    print(f"seed {SEED}")
    for number in range(count):
        out = tmp_path / str(number // 4)
        started = place.start(out, "data.workers=2")
        steps_on(out, started, rng)
        send(rng.choice(until(lambda: children(started.pid), 10, "loader processes")), signal.SIGKILL)  # noqa: B023
        began = time.monotonic()
        status, told = place.ended(started), started.errors().splitlines()
        took.append(time.monotonic() - began)
        assert status == TryAgain.status and len(told) == 1 and "a loader process was killed" in told[0], told
        lost.append(check(out))
        if number % 4 == 3 or number == count - 1:
            to_end(place, out, 1)
    figures("loader_killed", faults=count, most_seconds_to_end=round(max(took), 1), most_steps_lost=max(lost))


def test_a_loader_process_that_hangs_or_is_slow(place, tmp_path, often, figures):
    """All stop: for a while, and the run goes on as if nothing had been; for longer than its patience, and it ends."""
    if often(False, True):  # tests/test_loader_faults.py has one that hangs
        return
    rng = random.Random(f"{SEED} hang")
    started = place.start(tmp_path / "slow", "data.workers=2")
    steps_on(tmp_path / "slow", started, rng)
    workers = children(started.pid)
    for pid in workers:
        send(pid, signal.SIGSTOP)
    time.sleep(8)
    for pid in workers:
        send(pid, signal.SIGCONT)
    assert place.ended(started) == 0
    assert_same_run(tmp_path / "slow", place.whole(1))
    out = tmp_path / "hangs"
    started = place.start(out, "data.workers=2", code=HURRIED)
    steps_on(out, started, rng)
    began = time.monotonic()
    for pid in children(started.pid):
        send(pid, signal.SIGSTOP)
    status, (line,) = place.ended(started), started.errors().splitlines()
    assert status == TryAgain.status and "no batch came from the loader processes in 15 s" in line, line
    check(out)
    to_end(place, out, 1)
    figures("loader_hangs", paused=1, hung=1, patience_seconds=15, seconds_to_end=round(time.monotonic() - began, 1))


FAULTS = {
    "rank killed": (6, 1),
    "rank 0 killed in a checkpoint": (5, 0),
    "rank told to end": (4, 0),
    "launcher killed": (5, 0),
    "launcher told to end": (3, 0),
}


def test_two_ranks_of_which_one_or_the_launcher_is_killed_or_told_to_end(place, tmp_path, often, figures):
    rng, lost, took, number = random.Random(f"{SEED} ranks"), [], [], 0
    left = [name for name, count in FAULTS.items() for _ in range(often(*count))]
    rng.shuffle(left)
    counted = {name.replace(" ", "_"): left.count(name) for name in FAULTS}
    print(f"seed {SEED}: {left}")
    while left:
        out = tmp_path / str(number // 4)
        number += 1
        fault = left.pop()
        started = place.start(out, "data.workers=1", processes=2)
        steps_on(out, started, rng)
        began, saves = time.monotonic(), "told" in fault or fault == "launcher killed"
        if fault == "rank 0 killed in a checkpoint":
            until(lambda: list((out / "checkpoints").glob(".*.part.pt")), BOUND, "checkpoint", 0)  # noqa: B023
            send(ranks(started.pid)[0], signal.SIGKILL)
        else:
            victim = started.pid if "launcher" in fault else ranks(started.pid)[rng.randint(0, 1)]
            send(victim, signal.SIGTERM if "told" in fault else signal.SIGKILL)
        status = place.ended(started)
        took.append(time.monotonic() - began)
        assert status != 0, fault
        lost.append(check(out))
        if saves:
            assert lost[-1] == 0 and "saved at step" in started.said(), (fault, lost[-1], started.errors())
        else:
            assert "Traceback" not in started.errors().split("torch/distributed/")[0], started.errors()
        if number % 4 == 0 or not left:
            to_end(place, out, 2)
    figures("ranks", **counted, most_seconds_to_end=round(max(took), 1), most_steps_lost=max(lost))


def test_a_slow_rank_is_waited_for(place, tmp_path, often, figures):
    rng, out = random.Random(f"{SEED} slow"), tmp_path / "out"
    started, count = place.start(out, "data.workers=1", processes=2), often(5, 1)
    for _ in range(count):
        steps_on(out, started, rng)
        pid = ranks(started.pid)[rng.randint(0, 1)]
        send(pid, signal.SIGSTOP)
        before = until(lambda: last_step(out), 1, "steps")
        time.sleep(rng.random() * 5)
        assert last_step(out) <= before + 1
        send(pid, signal.SIGCONT)
    assert place.ended(started) == 0, started.errors()[-2000:]
    assert_same_run(out, place.whole(2))
    figures("slow_ranks", pauses=count, of_seconds="up to 5")


def test_a_rank_that_hangs_is_given_up(place, tmp_path, often, figures):
    rng, out = random.Random(f"{SEED} hung rank"), tmp_path / "out"
    if not often(1, 0):
        return
    started = place.start(out, "data.workers=1", processes=2, code=HURRIED_RANKS)
    steps_on(out, started, rng)
    began = time.monotonic()
    send(ranks(started.pid)[1], signal.SIGSTOP)
    assert place.ended(started) != 0 and "other ranks cannot be reached" in started.errors(), started.errors()
    took = time.monotonic() - began
    check(out)
    to_end(place, out, 2)
    figures("hung_rank", patience_seconds=15, seconds_to_end=round(took, 1))


def test_a_rank_that_dies_before_it_begins_ends_the_others_here(place, tmp_path, often, figures):
    """Under slurm/submit.py --local nothing tells the others."""
    if not often(1, 0):
        return
    (tmp_path / "breaks").mkdir()
    (tmp_path / "breaks" / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('SUBMITIT_LOCAL_GLOBALID') == '1': os.kill(os.getpid(), 9)\n"
        "if os.environ.get('SUBMITIT_LOCAL_GLOBALID') == '0':\n"
        "    import fcmae.launch\n"
        "    fcmae.launch.STARTING = 20\n"
    )
    (tmp_path / "profile.yaml").write_text(f"setup: [export PYTHONPATH={tmp_path / 'breaks'}]\n")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "slurm" / "submit.py"), "pretrain", *place.given, f"out={tmp_path / 'out'}",
         "--local", "--tasks-per-node", "2", "--profile", str(tmp_path / "profile.yaml")],
        env={**environment(), MARK: place.mark}, capture_output=True, text=True, timeout=BOUND,
    )  # fmt: skip
    assert done.returncode == 1 and "did not end well" in done.stderr, done.stderr
    (log,) = (tmp_path / "out" / "slurm").glob("*_0_log.out")
    assert "rank 1 did not begin in 20 s" in log.read_text()
    until(lambda: not living(place.mark), 30, "processes are left", 0.1)
    figures("local_rank_never_began", patience_seconds=20, seconds_to_end=round(time.monotonic() - began, 1))
