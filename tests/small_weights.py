"""Small files of weights, as others write them."""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

from helpers import golden, section, shake

AUTHORS = "fcmae_b1_128px"  # the golden file that has their checkpoint


def authors_file(folder: Path) -> Path:
    """What the authors' pretraining script writes: the weights under `model`, its command line beside them."""
    tensors, _ = golden(AUTHORS)
    path = folder / "checkpoint-799.pth"
    torch.save({"model": section(tensors, "checkpoint."), "args": argparse.Namespace(lr=1.5e-4, mask_ratio=0.6)}, path)
    return path


def small_timm(classes: int = 0) -> torch.nn.Module:
    """A ConvNeXt V2 of timm's with four narrow stages and random weights."""
    model = timm.models.convnext.ConvNeXt(
        depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), use_grn=True, ls_init_value=None, num_classes=classes
    )
    return shake(model).eval()
