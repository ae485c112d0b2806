"""The stem for other channels than it was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

MODES = ("mean", "repeat", "first")


def channel_map(mode: str, source: int, target: int) -> Tensor:
    """(target, source) float64: each new channel's kernel as a sum of the old ones.

    `mean`: all the same, the mean of the old ones, scaled so that an image that is equal in all channels gives what it
    gave. `repeat`: the old ones in turn, each divided by how often it comes, to the same end; of fewer channels than
    before the first ones are left, scaled up. `first`: the first ones as they are, further ones zero.
    """
    if mode == "mean":
        return torch.full((target, source), 1 / target, dtype=torch.float64)
    made, rows = torch.zeros(target, source, dtype=torch.float64), torch.arange(target)
    if mode == "repeat":
        made[rows, rows % source] = 1.0
        made *= max(1.0, source / target) / made.sum(0).clamp(min=1)
    else:
        made[rows[:source], rows[:source]] = 1.0
    return made


def adapt(weight: Tensor, channels: Tensor) -> Tensor:
    """A stem's weight (C', source, k, k) for the channels of a `channel_map`, in its own dtype."""
    return torch.einsum("ts,osij->otij", channels, weight.double()).to(weight.dtype).contiguous()
