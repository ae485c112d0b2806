"""Several finished runs side by side: what pretraining gains over training from scratch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fcmae.errors import UsageError
from fcmae.train.run_folder import RunFolder

HEAD = "| run | init | epochs | labels | top-1 | EMA top-1 | balanced | gain over scratch, EMA if there is one |"


def command(runs: list[str]) -> int:
    """Print the table of runs; the exit status."""
    try:
        if not runs:
            raise UsageError("--table needs the folders of finished runs: --table RUN RUN ...")
        text = markdown([read(Path(run)) for run in runs])
    except (UsageError, OSError) as error:
        print(f"fcmae.finetune: error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


def read(run: Path) -> dict:
    """results.json of a run. Raises UsageError for what is no finished run."""
    path = RunFolder(run).results
    if not path.is_file():
        what = "is not finished: let it end first" if RunFolder(run).validation.is_file() else "is no fine-tuned run"
        raise UsageError(f"{run} {what} (no results.json there)")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is not readable: {error}") from None
    if found.get("format") != "fcmae-finetune-1":
        raise UsageError(f"{path} is not of a fine-tuned run")
    return {**found, "run": str(run)}


def markdown(rows: list[dict]) -> str:
    """One row a run; the gain is over the run without init of the same model, images, labels and epochs."""
    lines = [HEAD, "|" + " --- |" * HEAD.count(" | ") + " --- |"]
    for row in rows:
        same = [r for r in rows if r["init"] is None and all(r[key] == row[key] for key in _SAME)]
        gain = "–"
        if row["init"] is not None and same:
            gain = f"{100 * (top1(row) - sum(map(top1, same)) / len(same)):+.2f}"
        ema = f"{100 * row['ema']['top1']:.2f}" if row["ema"] else "–"
        name = f"{row['run']} ({row['model'] or 'own size'}{_frozen(row)})"
        lines.append(
            f"| {name} | {row['init'] or 'scratch'} | {row['epochs']:g} | {row['fraction']:.0%} "
            "| "
            f"{100 * row['last']['top1']:.2f} | {ema} | {100 * row['last']['balanced']:.2f} | {gain} |"
        )
    return "\n".join(lines) + "\n"


def _frozen(row: dict) -> str:
    return "" if row["blocks_trained"] is None else f", {row['blocks_trained']:g} blocks trained"


_SAME = ("model", "train", "val", "fraction", "epochs", "blocks_trained")


def top1(row: dict) -> float:
    """The accuracy that counts: of the average where there is one."""
    return (row["ema"] or row["last"])["top1"]
