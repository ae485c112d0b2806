"""What every command shares: `CONFIG key=value ...`, --help, and one line and status 2 for bad input, or 75."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fcmae import config as settings
from fcmae.errors import UsageError, one_line
from fcmae.train.place import find_place, rank_label


def command_line(*words: object) -> str:
    """What to type for this Python to be given these words: quoted where a shell would read something else."""
    on_path = shutil.which("python")
    python = "python" if on_path and os.path.samefile(on_path, sys.executable) else os.path.relpath(sys.executable)
    return shlex.join([python, *map(str, words)])


def timm_call(name: str, arguments: dict[str, object], weights: Path) -> str:
    """The call that gives timm's model of these weights; no single quotes, so that a command line of it can be read."""
    given = {**arguments, "checkpoint_path": str(weights)}
    said = [f"{key}={json.dumps(value) if isinstance(value, str) else value}" for key, value in given.items()]
    return f'timm.create_model("{name}", {", ".join(said)})'


def run_command(command: str, schema: type, run: Callable[..., int], argv: list[str] | None = None) -> int:
    """Load the configuration named on the command line, call `run(config)` and return the exit status.

    command: the module's name, e.g. `fcmae.pretrain`. schema: its configuration dataclass.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in arguments):
        print(settings.help_text(command, schema))
        return 0
    try:
        if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
            raise UsageError(f"name a config file first: python -m {command} CONFIG.yaml [key=value ...], or --help")
        config = settings.load(schema, arguments[0], arguments[1:])
        _check_rates(config, arguments[1:])
        if find_place().rank == 0:
            print(*[f"{line}\n" for line in settings.repeats(arguments[1:])], sep="", end="", flush=True)
        return run(config)
    except KeyboardInterrupt:  # before there is anything to save; training ends by itself
        print(f"{command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (UsageError, OSError) as error:  # OSError: a full disk, a file that cannot be read
        told = error
    except RuntimeError as error:
        told = _lost(error)
        if told is None:
            raise
    line = f"{command}: error: {rank_label(find_place())}{one_line(str(told))}"
    print(line, file=sys.stderr)
    _tell_torchrun(line)
    return getattr(told, "status", UsageError.status)


def _check_rates(config: Any, words: list[str]) -> None:
    given = [word for word in words if word.startswith("train.base_lr=")]
    if given and config.train.lr is not None:
        raise UsageError(
            f"{given[-1]} has no effect while train.lr is {config.train.lr:g}; set that, or train.lr=null as well"
        )


def _lost(error: RuntimeError) -> UsageError | None:
    from fcmae.data.loader import end_workers  # torch, which --help does without
    from fcmae.train.lost import lost

    told = lost(error)
    if told is not None:
        end_workers()  # one that hangs would be waited for at the end of this process
    return told


def _tell_torchrun(line: str) -> None:
    """torchrun reports at length what its processes left with, and ends with what it finds in this file."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
