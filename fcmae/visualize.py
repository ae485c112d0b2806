"""Look at reconstructions: `python -m fcmae.visualize RUN... --out DIR`.

The main path, top to bottom: command line -> runs -> images -> every strategy and ratio, all runs side by side, as a
PNG -> one page with them all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch

from fcmae.analysis import gallery, page
from fcmae.analysis.images import read_images
from fcmae.analysis.subjects import open_subjects
from fcmae.errors import UsageError, nearest
from fcmae.files import write_whole
from fcmae.masking import STRATEGIES
from fcmae.resizing import pair
from fcmae.train.distributed import pick_device

PAGE = "index.html"
EPILOG = """RUN is a run's folder or checkpoint, the folder of a comparison (its arms), or any file with a decoder that
fcmae.convert reads. Runs with the same mask unit get the same masks."""


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0, or 2 with one line for bad input."""
    parser = argparse.ArgumentParser("python -m fcmae.visualize", description=__doc__.splitlines()[0], epilog=EPILOG)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs, side by side")
    parser.add_argument("--images", help="folder, list, shards, or sample; default: the images of the first run")
    parser.add_argument("--out", type=Path, required=True, help=f"folder for STRATEGY_RATIO.png and {PAGE}")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.3, 0.6, 0.75, 0.9], metavar="R", help="mask ratios; %(default)s"
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["random", "block"],
        metavar="S",
        help=f"of {', '.join(STRATEGIES)}; %(default)s",
    )
    parser.add_argument("--count", type=int, default=6, metavar="N", help="images; default 6")
    parser.add_argument(
        "--image-size", type=int, nargs="+", metavar="PX", help="one number or height and width; default the runs' own"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--seed", type=int, default=0, help="of the masks; default 0")
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="what to call the runs")
    given = parser.parse_args(argv)
    try:
        visualize(given, say=print)
    except (UsageError, OSError) as error:
        print(f"fcmae.visualize: error: {error}", file=sys.stderr)
        return 2
    return 0


def visualize(given: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Draw what the command line says. Raises UsageError for bad input."""
    for strategy in given.strategies:
        if strategy not in STRATEGIES:
            known = f"known: {', '.join(STRATEGIES)}{nearest(strategy, STRATEGIES)}"
            raise UsageError(f"--strategies {strategy} is unknown; {known}")
    if wrong := [ratio for ratio in given.ratios if not 0 < ratio < 1]:
        raise UsageError(f"--ratios {wrong[0]:g} will not do: it must be between 0 and 1")
    if given.count < 1 or given.seed < 0:
        raise UsageError("--count must be 1 or more, and --seed 0 or more")
    page.check_out(given.out, PAGE)
    device = pick_device(given.device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    subjects = open_subjects(given.runs, given.labels, pair(given.image_size), device, given.seed)
    for subject in subjects:
        if not subject.decoder:
            raise UsageError(f"{subject.label} has no decoder, so it reconstructs nothing; give a pretraining run")
    gallery.check_labels(subjects)
    images = read_images(given.images, subjects, given.count)
    for line in images.say(given.count):
        say(line)
    sheets, left_out = [], []
    for strategy in dict.fromkeys(given.strategies):
        for ratio in sorted(set(given.ratios)):
            try:
                sheets.append(gallery.reconstructions(subjects, images, strategy, ratio, given.seed))
            except UsageError as error:  # no region is left, or none hidden
                left_out.append(f"{strategy} {ratio:g} left out: {error}")
    for line in left_out:
        say(line)
    if not sheets:
        raise UsageError("none of the --ratios leaves regions visible and hidden in these images; give others")
    given.out.mkdir(parents=True, exist_ok=True)
    # First: it tells that the pictures beside it are of this command, also where that is interrupted.
    text = page.html(subjects, images, sheets, left_out)
    write_whole(given.out / PAGE, lambda file: file.write(text.encode()))
    for old in set(gallery.sheets_in(given.out)) - {f"{sheet.name}.png" for sheet in sheets}:
        (given.out / old).unlink()
    for sheet in sheets:
        with matplotlib.rc_context({"text.parse_math": False}):  # a label is a name, whatever is in it
            gallery.write_sheet(given.out / f"{sheet.name}.png", sheet)
        losses = ", ".join(f"{label} {loss:.4f}" for label, loss in sheet.losses.items())
        say(f"{sheet.strategy} {sheet.ratio:g}: loss {losses}")
    say(f"look: {given.out / PAGE}, and a picture for each strategy and ratio beside it")


if __name__ == "__main__":
    sys.exit(main())
