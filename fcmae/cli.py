"""What every command shares: `CONFIG key=value ...`, --help, and one line and status 2 for bad input, or 75."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable

from fcmae import config as settings
from fcmae.errors import UsageError
from fcmae.train.place import find_place, rank_label


def interpreter() -> str:
    """How to name this Python on a command line."""
    on_path = shutil.which("python")
    return "python" if on_path and os.path.samefile(on_path, sys.executable) else os.path.relpath(sys.executable)


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
        return run(settings.load(schema, arguments[0], arguments[1:]))
    except (UsageError, OSError) as error:  # OSError: a full disk, a file that cannot be read
        print(f"{command}: error: {rank_label(find_place())}{error}", file=sys.stderr)
        return getattr(error, "status", UsageError.status)
