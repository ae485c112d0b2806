"""Long tests of what docs/reliability.md promises: `make soak` for half an hour or more,
`make soak ARGS=--short` for minutes.

Each leaves what it counted in FIGURES/NAME.json; tests/soak/table.py makes the document's table of these.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--short", action="store_true", help="a few of each fault, for continuous integration")
    parser.addoption("--figures", type=Path, default=Path("runs/soak"), help="folder for what was counted")


@pytest.fixture
def often(request) -> Callable:
    """often(full, short): which of the two, such as how many times to do something."""
    return lambda full, short: short if request.config.getoption("--short") else full


@pytest.fixture
def figures(request) -> Callable[..., None]:
    """figures(NAME, key=value, ...): what a test counted, plain data; a short form's lie apart."""
    began = time.monotonic()

    def write(name: str, **values) -> None:
        short, folder = request.config.getoption("--short"), request.config.getoption("--figures")
        folder = folder / "short" if short else folder
        folder.mkdir(parents=True, exist_ok=True)
        row = {"test": request.node.nodeid, "minutes": round((time.monotonic() - began) / 60, 1), **values}
        (folder / f"{name}.json").write_text(json.dumps(row, indent=1) + "\n")
        print(f"\n{name}: {row}")

    return write
