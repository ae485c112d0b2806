"""Small real pretraining runs for the tests of the trainer."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ending import ended

CONFIG = """
model: {name: fcmae_convnextv2_atto, image_size: 64, depths: [1, 1, 1, 1], dims: [8, 12, 16, 24], decoder_dim: 16}
train: {steps: 60, batch_size: 8, warmup_epochs: 1, lr: 1.0e-3}
data: {workers: 0}
log: {tensorboard: false, images: 0, print_every: 1, collapse_every: 7}
device: cpu
"""


def make_pictures(folder: Path, count: int = 40) -> Path:
    """Crops of real photographs as PNG files."""
    skimage_data = pytest.importorskip("skimage.data")
    photos = [skimage_data.astronaut(), skimage_data.chelsea(), skimage_data.coffee(), skimage_data.rocket()]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        photo = photos[i % len(photos)]
        top, left = rng.integers(photo.shape[0] - 96), rng.integers(photo.shape[1] - 96)
        Image.fromarray(photo[top : top + 96, left : left + 96]).save(folder / f"{i:03d}.png")
    return folder


def command(config: Path, *overrides: str, processes: int = 1) -> list[str]:
    """The command line of a pretraining run."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*start, "fcmae.pretrain", str(config), *overrides]


def environment() -> dict[str, str]:
    """One thread, so that several processes on few cores compute what one does; an aborted process tells its stack."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def run(config: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Run to the end; fails the test when the command fails."""
    started = command(config, *overrides, processes=processes)
    process = subprocess.Popen(started, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said, errors = ended(process, 300)
    assert process.returncode == 0, errors[-3000:]
    return subprocess.CompletedProcess(started, 0, said, errors)


def printed_model(said: str) -> torch.nn.Module:
    """timm's model by the line at a run's end that says how to use it, read as a shell reads it."""
    [line] = [line for line in said.splitlines() if line.startswith("use it:")]
    code = shlex.split(line)[-1].removeprefix("import timm; ")
    return eval(code.removeprefix("print(").removesuffix(".num_features)"), {"timm": timm}).eval()


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def final_state(out: Path) -> dict:
    """The newest checkpoint."""
    path = sorted((out / "checkpoints").glob("step_*.pt"))[-1]
    return torch.load(path, weights_only=True)


def assert_same(a, b, where: str = "") -> None:
    """Fail unless two nested states are bit for bit the same."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    """Two finished runs agree bit for bit: metrics, what was measured of collapse (of a branch from where it begins),
    exported encoder, and every part of the last checkpoint."""
    if all((run / "collapse.jsonl").exists() for run in (a, b)):
        one, two = sorted(((run / "collapse.jsonl").read_bytes() for run in (a, b)), key=len)
        assert two.endswith(one)
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert (a / "encoder.safetensors").read_bytes() == (b / "encoder.safetensors").read_bytes()
    one, two = final_state(a), final_state(b)
    for part in ("step", "model", "optimizer", "scaler", "rng", "skipped", "bad_images"):
        assert_same(one[part], two[part], part)
