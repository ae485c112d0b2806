"""Exceptions that say no more than that another process of the run is gone."""

from __future__ import annotations

import re

import torch.distributed as dist

from fcmae.errors import TryAgain

AGAIN = "the same command goes on from the last checkpoint"


def lost(error: Exception) -> TryAgain | None:
    """What to tell of an exception after which the same command may well go on: other ranks could not be reached, or a
    loader process died or hangs. None for any other."""
    said = " ".join(str(error).split())
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in said):
        return TryAgain(f"other ranks cannot be reached, their own messages tell why; {AGAIN} ({said[:200]})")
    if not isinstance(error, RuntimeError):
        return None
    if "insufficient shared memory" in said:
        return TryAgain(f"a loader process found no room in /dev/shm; raise its size, or lower data.workers; {AGAIN}")
    if re.match(r"DataLoader worker \(pid.*\) (is killed|exited)|Pin memory thread exited", said):
        return TryAgain(
            f"a loader process was killed, as systems do when memory runs out; lower data.workers or data.prefetch if "
            f"so; {AGAIN} ({said.partition('. ')[0]})"
        )
    if match := re.match(r"DataLoader timed out after (\d+)", said):
        return TryAgain(f"no batch came from the loader processes in {match[1]} s; is the storage there? {AGAIN}")
    if match := re.match(r"DataLoader workers did not begin, forked (\d+) times in (\d+)", said):
        return TryAgain(
            f"a loader process did not begin, forked {match[1]} times in {match[2]} s; is the machine overloaded? "
            f"lower data.workers; {AGAIN}"
        )
    return None
