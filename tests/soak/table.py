"""The table of docs/reliability.md from what soak tests counted: `python tests/soak/table.py [runs/soak]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: str = "runs/soak") -> int:
    """Print a line for each file of figures; 2 without any."""
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        print(f"{folder} has no figures; make soak writes them", file=sys.stderr)
        return 2
    print("| what | figures | test | minutes |\n| --- | --- | --- | --- |")
    for file in files:
        row = json.loads(file.read_text())
        test, minutes = row.pop("test"), row.pop("minutes")
        said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in row.items())
        print(f"| {file.stem.replace('_', ' ')} | {said} | `{test}` | {minutes} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
