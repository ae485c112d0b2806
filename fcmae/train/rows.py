"""Files of one JSON object a line, such as metrics.jsonl, of which a kill or a bad disk may have damaged a part."""

from __future__ import annotations

import json
from pathlib import Path

from fcmae.files import write_whole


def parsed(line: bytes) -> dict | None:
    """The object of one whole line with its "step"; None for a line that is damaged or cut short."""
    try:
        row = json.loads(line)
    except ValueError:  # of bytes that are no text, too
        return None
    whole = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), (int, float))
    return row if whole else None


def read_rows(path: Path, *needed: str) -> list[dict]:
    """The objects of a file that have every needed key, in their order; damaged lines are left out."""
    rows = (parsed(line) for line in path.read_bytes().splitlines(keepends=True))
    return [row for row in rows if row is not None and all(key in row for key in needed)]


def go_on(path: Path, step: float) -> None:
    """Make a file one to append to after `step`: lines of later steps go, and one cut short by a kill at the end.

    So do damaged lines in between, and it is said how many.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    rows = [parsed(line) for line in lines]
    kept = [line for line, row in zip(lines, rows, strict=True) if row is not None and row["step"] <= step]
    damaged = [n for n, row in enumerate(rows, 1) if row is None and (n < len(rows) or lines[-1].endswith(b"\n"))]
    if damaged:
        count = f"{len(damaged)} damaged lines" if len(damaged) > 1 else "a damaged line"
        print(f"warning: {path} has {count}, left out: number {damaged[0]}", flush=True)
    write_whole(path, lambda file: file.write(b"".join(kept)))
