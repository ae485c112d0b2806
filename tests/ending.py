"""The end of a command, or where it hangs."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from soak.processes import children, send


def ended(process: subprocess.Popen, seconds: float = 200) -> tuple[str, str]:
    """What a command, started with both its outputs as pipes, has said by its end.

    Of one that takes longer every process is aborted, and the test fails with each one's stack: Python tells it under
    PYTHONFAULTHANDLER, the kernel says what it waits for.
    """
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        pids = descendants(process.pid)
        waits = [f"{pid}: {_name(pid)}: {', '.join(_waits(pid))}" for pid in pids]
        for pid in reversed(pids):  # one whose child is gone would end by itself
            send(pid, signal.SIGABRT)
            time.sleep(0.5)  # so that they write one after another
            send(pid, signal.SIGKILL)  # one that is stopped
        try:
            said, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired as error:  # one that none of these is the parent of holds the pipes
            said, errors = ((part or b"").decode(errors="replace") for part in (error.stdout, error.stderr))
        raise AssertionError("\n".join([f"hung for {seconds} s", *waits, said[-4000:], errors[-20000:]])) from None


def descendants(pid: int) -> list[int]:
    """A process and those under it, parents first."""
    found = [pid]
    for parent in found:
        found += children(parent)
    return found


def _name(pid: int) -> str:
    return " ".join(_text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").split())[:150]


def _waits(pid: int) -> list[str]:
    """What each thread waits for in the kernel."""
    tasks = sorted(Path(f"/proc/{pid}/task").glob("*"))
    return [f"{_text(task / 'comm').strip()} in {_text(task / 'wchan') or '?'}" for task in tasks]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
