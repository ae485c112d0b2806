"""One process a run folder, also where a file system is shared between machines."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from fcmae.errors import TryAgain, UsageError

# What a requeued job waits at most for the lock of its own former start: file servers keep the locks of a machine that
# vanished for a while, NFS 4 for 90 seconds.
WAIT_SECONDS = 120


def locked(path: Path, wait: float = WAIT_SECONDS) -> IO:
    """`path`, open and locked until it is closed or this process ends; it names who holds it.

    The lock is POSIX's (fcntl). Between machines it holds where the file system passes such locks on: NFS 4, GPFS,
    Lustre mounted with `flock`, BeeGFS where enabled; elsewhere among the processes of one machine, or, where the
    system refuses locks, not at all, which is said. The same SLURM job, started again, waits up to `wait` seconds for
    its former self. Raises UsageError when another process holds it, TryAgain when its former self still does then: the
    server keeps the lock of a machine that was lost, NFS 3 until that is back.
    """
    file = open(path, "a+")
    deadline, waited = time.monotonic() + wait, False
    while not _taken(file):
        file.seek(0)
        holder = file.read().strip()
        who = f" ({holder})" if holder else ""
        if not _is_former_self(holder):
            file.close()
            raise UsageError(
                f"another process is running in {path.parent}{who}; wait for it, or choose another folder with out=..."
            )
        if time.monotonic() > deadline:
            file.close()
            raise TryAgain(
                f"{path} is still locked by this job's former start{who} after {wait:g} s; start it again, or, where "
                f"that machine is lost, remove the file"
            )
        if not waited:
            print(f"waiting for this job's former start{who} to leave {path.parent}", flush=True)
        waited = True
        time.sleep(1)
    file.truncate(0)
    file.write(f"{_this_process()}\n")
    file.flush()
    return file


def _taken(file: IO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers do not inherit it, unlike flock's
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        print(f"warning: {file.name}: {error.strerror}: a second process in this folder would not be noticed")
    return True


def _this_process() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"host {socket.gethostname()}, process {os.getpid()}" + (f", SLURM job {job}" if job else "")


def _is_former_self(holder: str) -> bool:
    job = os.environ.get("SLURM_JOB_ID")
    again = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    return again and holder.endswith(f", SLURM job {job}")
