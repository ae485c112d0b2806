"""Weights and images for the tests of fcmae.analyze and fcmae.visualize."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fcmae import config as settings
from fcmae.analyze import main
from fcmae.pretrain import build_model
from fcmae.schema import Config
from fcmae.train import family
from helpers import shake
from small_runs import make_pictures

CONFIGS = {
    "convnext": "{name: fcmae_convnextv2_atto, depths: [1, 1, 2, 1], dims: [8, 12, 16, 24], decoder_dim: 16}",
    "vit": "{name: mae_vit_tiny_patch16, dim: 32, depth: 3, heads: 2, decoder_dim: 32, decoder_depth: 1, "
    "decoder_heads: 2}",
}
MORE = "\nmask: {unit: 32, ratio: 0.5}\nloss: {norm_window: 32}\n"


def make_run(folder: Path, kind: str, images: Path, edit=None, size: int = 64, seed: int = 0) -> Path:
    """A run's folder as training leaves it, with weights of any value; edit: called with the model before."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "given.yaml").write_text(f"model: {CONFIGS[kind]}{MORE}")
    config = settings.load(
        Config, folder / "given.yaml", [f"model.image_size={size}", f"data.source={images}", f"out={folder}"]
    )
    family.fill(config)
    model = shake(build_model(config), seed)
    if edit is not None:
        with torch.no_grad():
            edit(model)
    settings.write_yaml(config, folder / "config.yaml")
    payload = {"format": "fcmae-checkpoint-2", "model": model.state_dict(), "config": settings.to_dict(config)}
    torch.save({**payload, "step": 1}, folder / "checkpoints" / "step_000000001.pt")
    return folder


def make_images(folder: Path) -> Path:
    """all/: photographs; one/: a single one; mixed/: three, two grey ones and two broken; broken/: only such."""
    every = sorted(make_pictures(folder / "all", 10).iterdir())
    for name in ("one", "mixed", "broken"):
        (folder / name).mkdir()
    (folder / "one" / "only.png").write_bytes(every[0].read_bytes())
    for i, path in enumerate(every[:5]):
        with Image.open(path) as image:
            image.convert("L" if i in (1, 3) else "RGB").save(folder / "mixed" / path.name)
    for name in ("mixed", "broken"):
        (folder / name / "torn.png").write_bytes(every[0].read_bytes()[:200])
        (folder / name / "empty.jpg").write_bytes(b"")
    return folder


def analysed(out: Path, what: str, *given: object) -> dict:
    """The JSON that the command writes; fails the test when the command fails."""
    assert main([*map(str, given), "--what", what, "--out", str(out), "--device", "cpu"]) == 0
    assert np.asarray(Image.open(out / f"{what}.png")).std() > 1
    return json.loads((out / f"{what}.json").read_text())
