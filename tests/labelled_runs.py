"""Small real runs on labelled images, for the tests of fine-tuning and probing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from fcmae.models import create_model
from shapes import make_shapes
from small_runs import assert_same, environment, final_state

CONFIG = """
model: {{image_size: 32, drop_path: 0.2}}
data:
  train: {place}/shapes/train
  val: {place}/shapes/val
  workers: 0
  randaugment: rand-m9-mstd0.5-inc1
  random_erasing: 0.5
  mixup: 0.8
  cutmix: 1.0
train: {{steps: 20, batch_size: 8, warmup_epochs: 1, lr: 2.0e-3, layer_decay: 0.9, label_smoothing: 0.1}}
ema: {{enabled: true, decay: 0.8}}
eval: {{batch_size: 8}}
log: {{tensorboard: false, print_every: 1}}
device: cpu
"""
PLAIN = ("data.mixup=0", "data.cutmix=0", "data.randaugment=null", "data.random_erasing=0", "model.drop_path=0")
LAST = "last.safetensors"


def make_place(folder: Path) -> Path:
    """A folder with shapes/, a config.yaml, and weights of small encoders: tiny.pt (FCMAE) and vit.pt (MAE, 32 px)."""
    make_shapes(folder / "shapes")
    (folder / "config.yaml").write_text(CONFIG.format(place=folder))
    torch.manual_seed(0)
    small = create_model("fcmae_convnextv2_atto", depths=[1, 1, 2, 1], dims=[8, 12, 16, 24], decoder_dim=16)
    vit = create_model("mae_vit_tiny_patch16", image_size=32, decoder_dim=32, decoder_depth=1, decoder_heads=2)
    for name, model in (("tiny", small), ("vit", vit)):
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return folder


def arguments(place: Path, out: Path, *overrides: str, init: str | None = "tiny.pt") -> list[str]:
    """What to call a command's `main` with."""
    begin = [] if init is None else [f"init={place / init}"]
    return [str(place / "config.yaml"), f"out={out}", *begin, *overrides]


def start(module: str, given: list[str], processes: int = 1) -> subprocess.Popen:
    """The command in a process, or several under torchrun."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), module, *given]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def validations(out: Path) -> list[dict]:
    """The lines of validation.jsonl."""
    return [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]


def results(out: Path) -> dict:
    """results.json."""
    return json.loads((out / "results.json").read_text())


def assert_same_outcome(a: Path, b: Path) -> None:
    """Two finished runs agree bit for bit: metrics, validations, exported weights, the last checkpoint."""
    for name in ("metrics.jsonl", "validation.jsonl", LAST, "best.safetensors", "best.json", "per_class.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    one, two = final_state(a), final_state(b)
    for part in ("step", "model", "optimizer", "scaler", "ema", "notes", "skipped", "bad_images"):
        assert (part in one) == (part in two)
        if part in one:
            assert_same(one[part], two[part], part)


def assert_close_weights(a: Path, b: Path, tolerance: float) -> None:
    """The last weights of two runs, relative to their length."""
    one, two = load_file(a / LAST), load_file(b / LAST)
    distance = sum((one[k] - two[k]).square().sum() for k in one).sqrt()
    assert distance < tolerance * sum(v.square().sum() for v in two.values()).sqrt()
