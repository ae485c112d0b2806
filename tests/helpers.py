"""What several tests share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fcmae.kernels.tiles import Tiles
from fcmae.masking import draw_mask

DATA = Path(__file__).parent / "data"

# Relative to the largest magnitude compared: storage rounding of the dtype times a few accumulation steps.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Fail unless the two differ by less than `tolerance` times the largest expected magnitude."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    worst = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    assert worst <= tolerance * scale, f"off by {worst:.3g}, {worst / (scale or 1):.3g} of the largest value"


def masks(
    batch: int, grid: tuple[int, int], ratio: float = 0.6, seed: int = 0, strategy: str = "random"
) -> torch.Tensor:
    """(B, gh, gw) bool, True = masked."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw_mask(rng, grid, ratio, strategy) for _ in range(batch)]))


def tiles(batch: int, grid: tuple[int, int], keep: int, seed: int = 0) -> Tiles:
    """Tables of random masks that keep exactly `keep` regions, all of them included."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, grid[0] * grid[1]), dtype=bool)
    for row in mask:
        row[rng.permutation(row.size)[:keep]] = False
    return Tiles.from_mask(torch.from_numpy(mask.reshape(batch, *grid)), keep)


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values for every parameter, zeros (GRN, biases) included, so that every term of the network matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            fan_in = p[0].numel() if p.ndim > 1 else 25
            p.copy_(noise * fan_in**-0.5 + (1.0 if name.endswith("norm.weight") else 0.0))
    return model


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and metadata of an output recorded from the authors' code."""
    path = DATA / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return load_file(path), {k: json.loads(v) if v[0] in "[0123456789" else v for k, v in metadata.items()}


def section(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
