"""Runs killed, told to end, or meet a full disk at random moments: nothing half, nothing lost, no difference."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import labelled_runs
import small_comparison
import small_runs
from fcmae.train import checkpoint
from soak import crashes
from soak.crashes import Counts, Kind
from soak.starter import Starter

pytestmark = pytest.mark.soak

SEED = 0
# (full, short) of each fault: 202 and 10 in all
KILLED = {"fcmae": (30, 3), "mae": (20, 0), "finetune": (24, 2), "compare": (16, 0)}
TOLD = {"fcmae": (20, 2), "mae": (12, 0), "finetune": (18, 1), "compare": (10, 0)}
FULL = {"fcmae": (18, 2), "mae": (10, 0), "finetune": (16, 0), "compare": (8, 0)}
MOMENTS = ["any", "any", "checkpoint", "checkpoint", "trimming", "export", "start"]
DISK = 24 * 2**20
MAE = """{name: mae_vit_tiny_patch16, image_size: 64, dim: 32, depth: 2, heads: 2,
        decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}"""
PRETRAINING = ["train.steps=13", "checkpoint.every=3", "log.tensorboard=true", "log.images=2", "log.images_every=2",
               "log.collapse_every=4"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images and configs of every kind of run."""
    folder = tmp_path_factory.mktemp("crash")
    small_runs.make_pictures(folder / "pictures")
    (folder / "fcmae.yaml").write_text(small_runs.CONFIG)
    (folder / "mae.yaml").write_text(re.sub(r"\{name: fcmae.*\}", MAE, small_runs.CONFIG))
    labelled_runs.make_place(folder / "labelled")
    small_comparison.make_place(folder / "comparison")
    return folder


@pytest.fixture(scope="module")
def kinds(place) -> dict[str, Kind]:
    """What is broken off."""

    def pretraining(name: str) -> Callable[[Path], list[str]]:
        given = [str(place / f"{name}.yaml"), f"data.source={place / 'pictures'}", *PRETRAINING]
        return lambda out: [*given, f"out={out}"]

    def finetuning(out: Path) -> list[str]:
        settings = ["train.steps=13", "checkpoint.every=3", "log.tensorboard=true", "eval.every=1"]
        return labelled_runs.arguments(place / "labelled", out, *settings)

    def comparing(out: Path) -> list[str]:
        settings = ["budget.steps=7", "checkpoint.every=2", "log.images=2", "arms_in_turn=true"]
        return small_comparison.arguments(place / "comparison", out, *settings)

    def same_arms(a: Path, b: Path) -> None:
        for run in arms:
            small_runs.assert_same_run(a / run, b / run)

    arms = tuple(f"arms/{name}" for name in small_comparison.ARMS)
    return {
        "fcmae": Kind("fcmae.pretrain", pretraining("fcmae"), 3, small_runs.assert_same_run),
        "mae": Kind("fcmae.pretrain", pretraining("mae"), 3, small_runs.assert_same_run),
        "finetune": Kind("fcmae.finetune", finetuning, 3, labelled_runs.assert_same_outcome),
        "compare": Kind("fcmae.compare", comparing, 2, same_arms, arms),
    }


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    """Starts runs on the ordinary disk."""
    starter = Starter(tmp_path_factory.mktemp("starts"))
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def wholes(starter, kinds, tmp_path_factory) -> Callable[[str], tuple[Path, float]]:
    """wholes(NAME): the folder of the uninterrupted run, and the seconds that it took."""
    known: dict[str, tuple[Path, float]] = {}

    def whole(name: str) -> tuple[Path, float]:
        if name not in known:
            out = tmp_path_factory.mktemp("whole") / name
            started = starter.start(kinds[name].module, kinds[name].arguments(out))
            began = time.monotonic()
            assert started.wait() == 0, started.errors()[-2000:]
            known[name] = out, time.monotonic() - began
            crashes.check_whole(out)
        return known[name]

    return whole


class Trial:
    """Starts in one folder after another, each until a start comes to its end; `seen`: how to look at a path."""

    def __init__(self, kind: Kind, whole: Path, folder: Path, seen: Callable[[Path], Path] = lambda path: path):
        self.kind, self.whole, self.folder, self.seen = kind, whole, folder, seen
        self.counts, self.number = Counts(), 0
        self._fresh()

    def arguments(self, workers: int = 0) -> list[str]:
        """What the next start is told."""
        return [*self.kind.arguments(self.out), f"data.workers={workers}"]

    def look(self, started) -> list[int]:
        """After a start: everything holds; the steps that each of its runs loses."""
        out, before = self.seen(self.out), self.held
        crashes.check_whole(out)
        newest = [steps[-1] if steps else 0 for steps in before]
        self.counts.resumed += crashes.check_resumed(started.said(), self.kind, newest)
        folders = self.kind.folders(out)
        lost = [crashes.check_checkpoints(run, b, self.kind.every) for run, b in zip(folders, before, strict=True)]
        self.held = [checkpoint.steps_in(run / "checkpoints") for run in folders]
        return lost

    def broken_off(self, started, name: str) -> list[int]:
        """Count a fault."""
        lost = self.look(started)
        self.counts.faults[name] += 1
        self.counts.lost += lost
        return lost

    def finished(self, started) -> None:
        """The run is the uninterrupted one, and nothing unfinished lies about; the next begins in a fresh folder."""
        self.look(started)
        out = self.seen(self.out)
        self.kind.same(out, self.whole)
        assert not crashes.unfinished(out), crashes.unfinished(out)
        assert names_below(out) == names_below(self.whole)
        self.counts.runs += 1
        shutil.rmtree(out)
        self._fresh()

    def _fresh(self) -> None:
        self.number += 1
        self.out = self.folder / str(self.number)
        self.held: list[list[int]] = [[] for _ in self.kind.runs]


def names_below(folder: Path) -> list[str]:
    """Every file of a run, but TensorBoard's, of which each start makes another."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if "tfevents" not in name)


@pytest.mark.parametrize("name", KILLED)
def test_killed_or_told_to_end_at_random_moments(name, kinds, wholes, starter, tmp_path, often, figures):
    left = ["SIGKILL"] * often(*KILLED[name]) + ["SIGTERM"] * often(*TOLD[name])
    if not left:
        return
    kind, (whole, duration), rng = kinds[name], wholes(name), random.Random(f"{SEED} {name}")
    trial = Trial(kind, whole, tmp_path)
    rng.shuffle(left)
    print(f"seed {SEED}")
    torn, most = often(1, 0), len(left) + 30
    while left or (trial.counts.torn < torn and trial.counts.faults.total() < most):
        left = left or ["SIGKILL"]  # on, until one was killed in the middle of a checkpoint
        moment = rng.choice(MOMENTS)
        if moment == "start":
            started = starter.start_anew(kind.module, trial.arguments(rng.choice([0, 1, 2])))
            came = crashes.when(started, rng, "any", trial.out, 4 + duration, kind)
        else:
            started = starter.start(kind.module, trial.arguments(rng.choice([0, 1, 2])))
            came = crashes.when(started, rng, moment, trial.out, duration, kind)
        if came:
            started.signal(9 if left[-1] == "SIGKILL" else 15)
        status = started.wait()
        if status == 0:  # the moment came too late
            trial.finished(started)
            continue
        fault = left.pop()
        assert status in ((-9,) if fault == "SIGKILL" else (-15, 143)), f"{status}: {started.errors()}"
        lost = trial.broken_off(started, fault)
        trial.counts.moments[moment] += 1
        halves = [half for run in kind.folders(trial.out) for half in run.glob("checkpoints/.*.part.pt")]
        trial.counts.torn += fault == "SIGKILL" and len(halves) > 0
        if status == 143:
            assert not any(lost) and "saved at step" in started.said(), (lost, started.said())
    last = starter.start_anew(kind.module, trial.arguments())
    assert last.wait() == 0, last.errors()[-2000:]
    trial.finished(last)
    assert trial.counts.torn >= torn, "none was killed in the middle of a checkpoint"
    figures(f"killed_{name}", seed=SEED, **trial.counts.row())


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A starter with a disk that is soon full, and where that is."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs user and mount namespaces: unshare -rm")
    folder = tmp_path_factory.mktemp("disk")
    starter = Starter(folder / "starts", folder / "disk", DISK)
    yield starter, folder / "disk"
    starter.close()


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk(name, kinds, wholes, small_disk, often, figures):
    full = often(*FULL[name])
    if not full:
        return
    kind, (whole, duration), rng = kinds[name], wholes(name), random.Random(f"{SEED} full {name}")
    starter, disk = small_disk
    trial = Trial(kind, whole, disk / name, starter.seen)
    starter.seen(disk / name).mkdir()
    filler, needed = starter.seen(disk / "filler"), sum(p.stat().st_size for p in whole.rglob("*")) * 5 // 4
    print(f"seed {SEED}")
    while trial.counts.faults["full disk"] < full:
        space = rng.choice([0, rng.randint(0, 40) * 4096, rng.randint(0, needed), None, None, None])
        if space is not None:  # it runs out wherever the run then is
            fill(filler, space)
        started = starter.start(kind.module, trial.arguments())
        if space is None:  # somebody else fills it, all but a few pages
            moment = rng.choice(["any", "any", "checkpoint", "export"])
            crashes.when(started, rng, moment, trial.seen(trial.out), duration, kind)
            fill(filler, rng.choice([0, 1, 2, 10]) * 4096)
        status = started.wait()
        filler.unlink()
        if status == 0:  # there was space enough
            trial.finished(started)
            continue
        lines = started.errors().splitlines()
        assert status == 2 and len(lines) == 1 and "error: " in lines[0], f"{status}, {space} bytes: {started.errors()}"
        wrong = re.search(r"(?:could not|cannot) write (?:into )?(?:out=)?(\S+?):? ", lines[0])
        assert wrong and "No space left on device" in lines[0], lines[0]
        trial.broken_off(started, "full disk")
        assert not crashes.unfinished(trial.seen(trial.out)), crashes.unfinished(trial.seen(trial.out))
        trial.counts.moments[kind_of(Path(wrong[1]).name)] += 1
    last = starter.start(kind.module, trial.arguments())
    assert last.wait() == 0, last.errors()[-2000:]
    trial.finished(last)
    figures(f"full_disk_{name}", seed=SEED, **trial.counts.row())


def fill(filler: Path, space: int) -> None:
    """Leave so many bytes of the disk free."""
    with open(filler, "wb") as file:
        while True:
            disk = os.statvfs(filler.parent)
            if (size := disk.f_bavail * disk.f_frsize - space) <= 0:
                return
            with contextlib.suppress(OSError):  # a run that writes meanwhile may have taken some of it
                os.posix_fallocate(file.fileno(), 0, size)
                return


def kind_of(name: str) -> str:
    """What sort of file had no space, by its name."""
    if name.startswith("step_"):
        return "checkpoint" if name.endswith(".pt") else "picture"
    return "tensorboard" if "tfevents" in name else name
