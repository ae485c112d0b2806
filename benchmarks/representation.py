"""The table of benchmarks/representation.sh: `python benchmarks/representation.py OUT`, whose runs are finished."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

MEASURES = {  # folder, results.json's part
    "kNN, k = 20": ("knn", "knn_20"),
    "logistic regression": ("knn", "logistic"),
    "linear probe": ("linear", "last"),
    "fine-tuning": ("finetune", "ema"),
}
STARTS = {"pretrained": "pretrained", "random": "random weights / from scratch"}


def values(out: Path, model: str, start: str, measure: str, key: str) -> list[float]:
    """Percentages, one a seed."""
    folder, part = MEASURES[measure]
    files = sorted((out / model).glob(f"seed_*/{start}/{folder}/results.json"))
    return [100 * json.loads(file.read_text())[part][key] for file in files]


def cell(numbers: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    if not numbers:
        return "–"
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.1f}{spread}"


def gain(pretrained: list[float], other: list[float]) -> str:
    """The difference of means, and whether it is more than the larger of the two spreads."""
    if not pretrained or not other:
        return "–"
    found = statistics.fmean(pretrained) - statistics.fmean(other)
    if min(len(pretrained), len(other)) < 2:
        return f"{found:+.1f}"
    spread = max(statistics.stdev(pretrained), statistics.stdev(other))
    return f"{found:+.1f}, {'more' if found > spread else 'NOT more'} than the spread"


def table(out: Path) -> str:
    """Markdown: of every model and measure top-1 and balanced accuracy, pretrained and not, and the difference."""
    head = ["model", "measure", *(f"{text}: top-1, %" for text in STARTS.values()), "gain"]
    head += [f"{text}: balanced, %" for text in STARTS.values()] + ["gain", "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for model in sorted(path.name for path in out.iterdir() if any(path.glob("seed_*"))):
        for measure in MEASURES:
            cells: list[str] = []
            for key in ("top1", "balanced"):
                pair = [values(out, model, start, measure, key) for start in STARTS]
                cells += [*map(cell, pair), gain(*pair)]
            seeds = len(values(out, model, "pretrained", measure, "top1"))
            lines.append(f"| {model} | {measure} | {' | '.join(cells)} | {seeds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python benchmarks/representation.py OUT, the folder that benchmarks/representation.sh filled")
    print(table(Path(sys.argv[1])))
