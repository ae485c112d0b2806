"""Processes that start at once: a server that has imported everything forks each run off itself.

A start costs milliseconds where it took seconds, so that runs can be broken off by the hundred. What is forked is a
process like any other: it runs a command's `main` to the interpreter's end.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from small_runs import environment

MODULES = (
    "fcmae.pretrain", "fcmae.finetune", "fcmae.compare", "torch.utils.tensorboard", "matplotlib.backends.backend_agg",
    "timm", "torchvision.transforms.v2",
)  # fmt: skip
MOUNT = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'


class Started:
    """A process, its output in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.process, self.pid, self.status = folder, None, 0, None

    def signal(self, number: int) -> None:
        """Send a signal, to one that ended too."""
        if not self.ended():
            os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it has; its parent may not have asked for its status yet."""
        if self.status is not None:
            return True
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    def wait(self, seconds: float = 300) -> int:
        """The exit status, -n after signal n. Fails the test when it does not end in time."""
        deadline = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > deadline:
                os.kill(self.pid, 9)
                raise AssertionError(f"process {self.pid} did not end in {seconds} s: {self.said()}")
            time.sleep(0.002)
        if self.status is None:
            self.status = self.process()
        return self.status

    def said(self) -> str:
        """What it wrote to its standard output."""
        return (self.folder / "stdout").read_text()

    def errors(self) -> str:
        """What it wrote to its standard error."""
        return (self.folder / "stderr").read_text()


class Starter:
    """Starts commands, in a namespace with a small disk of its own at `disk` if that is given, of `size` bytes."""

    def __init__(self, logs: Path, disk: Path | None = None, size: int = 0):
        self.logs, self.count = logs, 0
        logs.mkdir(parents=True, exist_ok=True)
        within = []
        if disk is not None:
            disk.mkdir(parents=True)
            within = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(size), str(disk)]
        self.server = subprocess.Popen(
            [*within, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environment(), "PYTHONPATH": str(Path(__file__).parents[1])}, cwd=logs,
        )  # fmt: skip
        assert self.server.stdout.readline() == "ready\n", "the server of starts did not start"

    def start(self, module: str, arguments: list[str]) -> Started:
        """`python -m module *arguments`, forked."""
        started = self._new()
        started.pid = int(self._ask({"module": module, "arguments": arguments, "folder": str(started.folder)}))
        started.process = lambda: int(self._ask({"wait": started.pid}))
        return started

    def start_anew(self, module: str, arguments: list[str]) -> Started:
        """The same from the interpreter's beginning, outside of the namespace."""
        started = self._new()
        with open(started.folder / "stdout", "wb") as out, open(started.folder / "stderr", "wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], env=environment(), stdout=out, stderr=errors
            )
        started.pid, started.process = process.pid, process.wait
        return started

    def seen(self, path: Path) -> Path:
        """A path of the namespace as this process sees it."""
        return Path(f"/proc/{self.server.pid}/root", *path.parts[1:])

    def close(self) -> None:
        """End the server."""
        self.server.stdin.close()
        self.server.wait(300)  # a busy machine takes its time

    def _new(self) -> Started:
        self.count += 1
        folder = self.logs / f"{self.count:04d}"
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()  # a fork may be killed before it opens them
        return Started(folder)

    def _ask(self, order: dict) -> str:
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return self.server.stdout.readline()


def serve() -> None:
    """Fork a run for each order on standard input, or say how one ended."""
    for module in MODULES:
        importlib.import_module(module)
    print("ready", flush=True)
    while line := sys.stdin.readline():
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            become(order)
        print(child, flush=True)


def become(order: dict) -> None:
    """Be the command that was ordered, to its end."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(order["folder"], name), flags, 0o644), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [order["module"], *order["arguments"]]
    sys.exit(importlib.import_module(order["module"]).main(order["arguments"]))


if __name__ == "__main__":
    serve()
