"""A small comparison of a ConvNet and a ViT for the tests of fcmae.compare."""

from __future__ import annotations

from pathlib import Path

from fcmae import config as settings
from fcmae.comparison.settings import CompareConfig
from small_runs import make_pictures

CONFIG = """
arms:
  convnext:
    model: {name: fcmae_convnextv2_atto, depths: [1, 1, 2, 1], dims: [8, 12, 16, 24], decoder_dim: 16}
  vit:
    model: {name: mae_vit_tiny_patch16, dim: 32, depth: 3, heads: 2, decoder_dim: 32, decoder_depth: 1,
            decoder_heads: 2}
model: {image_size: [64, 96]}
budget: {steps: 12}
train: {batch_size: 8, warmup_epochs: 0.5, lr: 1.0e-3}
checkpoint: {every: 4}
data: {workers: 0}
evaluate: {images: 3, distance_images: 10, batch_size: 7, neighbours: 3}
log: {tensorboard: false, images: 0, print_every: 1}
device: cpu
"""
ARMS = ("convnext", "vit")


def make_place(folder: Path) -> Path:
    """Pictures in a class folder for each photograph they are cut from, and a config."""
    for i, path in enumerate(sorted(make_pictures(folder / "all", 40).iterdir())):
        home = folder / "pictures" / f"photo{i % 4}"
        home.mkdir(parents=True, exist_ok=True)
        path.rename(home / path.name)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def arguments(place: Path, out: Path | str, *overrides: str) -> list[str]:
    """The command's arguments."""
    return [str(place / "config.yaml"), f"data.source={place / 'pictures'}", f"out={out}", *overrides]


def labelled(place: Path) -> str:
    """The override that has the pictures told apart by their photograph."""
    return f"data.labelled={place / 'pictures'}"


def configured(place: Path, *overrides: str) -> CompareConfig:
    """The configuration as the command reads it."""
    return settings.load(CompareConfig, place / "config.yaml", arguments(place, "x", *overrides)[1:])
