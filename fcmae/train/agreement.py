"""Do all processes of a run hold the same settings and the same code? Asked before anything else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import fcmae
import fcmae.kernels
from fcmae import config as settings
from fcmae.errors import UsageError

_SOURCES = (".py", ".cpp", ".h")


def code_version() -> str:
    """The package's version and a digest of its source files: the same for the same sources, wherever installed."""
    files: dict[str, Path] = {}
    for package, prefix in ((fcmae, ""), (fcmae.kernels, "kernels/")):
        root = Path(package.__file__).parent
        files |= {f"{prefix}{p.relative_to(root).as_posix()}": p for p in root.rglob("*") if p.suffix in _SOURCES}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes())
    return f"{fcmae.__version__}, sources {digest.hexdigest()[:12]}"


def check_alike(held: list[tuple[str, dict[str, Any]]]) -> None:
    """held: `code_version()` and configuration as a nested dict, of every rank.

    Raises UsageError naming the ranks that differ from rank 0.
    """
    code, config = held[0]
    others = [rank for rank, (own, _) in enumerate(held) if own != code]
    if others:
        raise UsageError(
            f"{_ranks(others)} other code (fcmae {held[others[0]][0]}) than rank 0 (fcmae {code}); install the same "
            f"version on every node"
        )
    others = [rank for rank, (_, own) in enumerate(held) if own != config]
    if others:
        changed = settings.differences(config, held[others[0]][1])
        raise UsageError(
            f"{_ranks(others)} other settings than rank 0 ({'; '.join(changed[:3])}); start every process with the "
            f"same command"
        )


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {names} has" if len(ranks) == 1 else f"ranks {names} have"
