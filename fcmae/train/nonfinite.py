"""Steps that are skipped because their loss or gradient is not finite: where that began, and when it is enough."""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.errors import UsageError
from fcmae.train import optim
from fcmae.train.distributed import World
from fcmae.train.log import Log
from fcmae.train.state import TrainState

SHOWN = 3  # images on the printed line


def suspects(losses: list[Tensor], indices: list[list[int]]) -> list[int]:
    """The images of this rank's passes whose loss is not finite. losses: of each pass a scalar; indices: its images."""
    finite = torch.isfinite(torch.stack(losses)).tolist()
    return [i for fine, images in zip(finite, indices, strict=True) if not fine for i in images]


def note_skipped(state: TrainState, overflow: bool, names: list[str], limit: int, log: Log, world: World) -> None:
    """Count a step that was not made and say where it went wrong; on every rank, with its own suspects' names.

    overflow: the loss was finite and fp16 scaled gradients overflowed, which the scaler mends by itself: that is
    counted and not said. Raises UsageError after `limit` in a row.
    """
    progress = state.progress
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    stop = progress.skipped_in_a_row >= limit
    if overflow and not stop:
        return
    layer, names = optim.first_nonfinite(state.model), world.gathered(names)
    log.skipped({"step": progress.step, "layer": layer, "images": names})
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    images = f"images {shown} (skipped.jsonl in the run folder has them all)" if names else "every image's loss finite"
    where = f"gradient not finite at step {progress.step}, first in {layer}; {images}"
    if stop:
        raise UsageError(
            f"{where}; {limit} steps in a row were skipped, the last checkpoint is intact: from one that is older than "
            f"what went wrong branch off, resume=CHECKPOINT out=NEW, with a lower learning rate, train.clip_grad, or "
            f"train.precision=bf16 or fp32"
        )
    log.say(f"warning: {where}; step skipped, {progress.skipped} so far")
