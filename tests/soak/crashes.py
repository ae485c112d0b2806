"""What must hold of a run's folder at every moment, whatever ended the run."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from fcmae.train import checkpoint
from soak.starter import Started

KEEP_LAST = 2
UNFINISHED = (".part", ".fcmae-old", ".tmp")
TRIMMED = (".metrics.part", ".times.part", ".collapse.part", ".validation.part")


@dataclass(frozen=True)
class Kind:
    """A command and what it computes. runs: folders of its runs below `out`, one name each; `same` compares two."""

    module: str
    arguments: Callable[[Path], list[str]]
    every: int
    same: Callable[[Path, Path], None]
    runs: tuple[str, ...] = ("",)

    def folders(self, out: Path) -> list[Path]:
        """The folders of its runs."""
        return [out / run for run in self.runs]


@dataclass
class Counts:
    """What was seen: faults by name, steps lost by each, moments, kills that left half a checkpoint aside."""

    faults: Counter = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    moments: Counter = field(default_factory=Counter)
    torn: int = 0
    resumed: int = 0
    runs: int = 0

    def row(self) -> dict:
        """For the figures."""
        return {
            **{f"by_{name}": count for name, count in sorted(self.faults.items())},
            "moments": dict(sorted(self.moments.items())),
            "in_the_middle_of_a_checkpoint": self.torn,
            "finished_runs_compared": self.runs,
            "resumed": self.resumed,
            "mean_steps_lost": round(sum(self.lost) / max(1, len(self.lost)), 2),
            "most_steps_lost": max(self.lost, default=0),
        }


def unfinished(out: Path) -> list[Path]:
    """Files and folders that are being written, or that a kill left so."""
    return [path for path in out.rglob(".*") if any(mark in path.name for mark in UNFINISHED)]


def check_whole(out: Path) -> None:
    """Every file at its final name is whole, but for the last line of a log."""
    for path in out.rglob("*"):
        if path.is_dir() or path in unfinished(out):
            continue
        try:
            check_file(path)
        except Exception as error:
            raise AssertionError(f"{path} is not whole ({path.stat().st_size} bytes): {error}") from error


def check_file(path: Path) -> None:
    """Raises what reading the file to its end raises."""
    match path.suffix:
        case ".pt":
            checkpoint.read(path)
        case ".safetensors":
            load_file(path)
        case ".png":
            with Image.open(path) as image:
                image.load()
        case ".json":
            json.loads(path.read_text())
        case ".jsonl":
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    json.loads(line)
        case ".yaml":
            assert OmegaConf.load(path)
        case ".html":
            assert path.read_text().rstrip().endswith("</html>")
        case ".txt":
            assert path.read_text().endswith("\n")


def last_step(run: Path) -> int:
    """Of the last whole line of metrics.jsonl; 0 without any."""
    path = run / "metrics.jsonl"
    lines = [x for x in path.read_bytes().splitlines(keepends=True) if x.endswith(b"\n")] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def check_checkpoints(run: Path, before: list[int], every: int) -> int:
    """None that was there before is gone without newer ones in its place, and none that was due is missing; the steps
    that a run loses which was ended here."""
    held, reached = checkpoint.steps_in(run / "checkpoints"), last_step(run)
    for step in before:
        assert step in held or len([s for s in held if s > step]) >= KEEP_LAST, (
            f"{run}: lost {step} of {before}: {held}"
        )
    due = (reached - 1) // every * every if reached else 0  # that of the last line may have been in the making
    newest = held[-1] if held else 0
    assert newest >= due, f"{run}: metrics came to step {reached}, and the newest of {held} is not {due}"
    return max(0, reached - newest)


def check_resumed(said: str, kind: Kind, expected: list[int]) -> int:
    """A start that told where it goes on from named the newest checkpoint; how many were told."""
    told = [int(n) for n in re.findall(r"going on from step (\d+) of", said)]
    complete = [int(n) for n in re.findall(r"is complete at step (\d+)", said)]
    wanted = [step for step in expected if step]
    begun = said.count("step 1/")
    assert not (begun and len(wanted) == len(kind.runs)), f"began anew, though there were checkpoints: {said}"
    left = list(wanted)
    for step in told + complete:
        assert step in left, f"went on from {step}, the newest checkpoints were {expected}: {said}"
        left.remove(step)
    return len(told)


def when(started: Started, rng: random.Random, moment: str, out: Path, duration: float, kind: Kind) -> bool:
    """Wait for the moment; False when the process ended before it came."""
    if moment == "any":
        goal = time.monotonic() + rng.random() * duration
        while time.monotonic() < goal and not started.ended():
            time.sleep(0.001)
        return not started.ended()
    skip = rng.choice({"checkpoint": [0, 0, 1, 2, 3], "trimming": [0], "export": [0, 0, 0, 1]}[moment])
    folders = [folder for run in kind.folders(out) for folder in (run, run / "checkpoints", run / "reconstructions")]
    if out not in folders:
        folders.append(out)
    seen: set[str] = set()
    while not started.ended():
        for folder in folders:
            for name in names(folder):
                if not fits(moment, name):
                    continue
                seen.add(f"{folder}/{name}")
                if len(seen) > skip:
                    time.sleep(rng.choice([0, rng.random() * 0.005]))
                    return not started.ended()
    return False


def names(folder: Path) -> list[str]:
    """What a folder holds, if it is there."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def fits(moment: str, name: str) -> bool:
    """Whether a file is being written at that moment."""
    if not name.startswith(".") or ".part" not in name:
        return False
    if moment == "checkpoint":
        return name.endswith(".part.pt")
    if moment == "trimming":
        return name.startswith(TRIMMED)
    return not name.endswith((".part.pt", ".part.jsonl"))  # pictures, exported weights, reports, config.yaml
