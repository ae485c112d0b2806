"""Processes of a run, found by a mark in their environment whoever their parents are."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

MARK = "FCMAE_SOAK_MARK"


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with; nothing of one that is gone."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(word.decode(errors="replace").split("=", 1) for word in words if b"=" in word)


def status_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def living(mark: str) -> list[int]:
    """The processes with a mark, but zombies."""
    found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [n for n in found if environment_of(n).get(MARK) == mark and status_of(n)[:1] not in ([], ["Z"], ["X"])]


def children(pid: int) -> list[int]:
    """The processes that a process started itself."""
    found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [n for n in found if status_of(n)[1:2] == [str(pid)] and status_of(n)[0] not in "ZX"]


def ranks(launcher: int) -> dict[int, int]:
    """Rank -> process, of those that torchrun started."""
    return {int(rank): pid for pid in children(launcher) if (rank := environment_of(pid).get("RANK"))}


def until(condition: Callable[[], object], seconds: float, what: str, pause: float = 0.002):
    """What the condition gives once it is true. Fails the test after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not in {seconds} s"
        time.sleep(pause)
    return found


def send(pid: int, number: int) -> None:
    """A signal, to one that ended too."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
