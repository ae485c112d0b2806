"""Look inside encoders: `python -m fcmae.analyze RUN_OR_WEIGHTS... --what WHAT... --out DIR`.

The main path, top to bottom: command line -> subjects -> images -> each analysis measured, drawn and written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import matplotlib
import torch
from torch import Tensor

from fcmae.analysis import (
    activations,
    attention_distance,
    cka,
    cosine_distance,
    filters,
    mask_sensitivity,
    position_similarity,
    receptive_field,
)
from fcmae.analysis.blocks import first_nonfinite
from fcmae.analysis.images import Images, read_images
from fcmae.analysis.results import check_out, write
from fcmae.analysis.subjects import Subject, open_subjects
from fcmae.errors import UsageError, nearest
from fcmae.resizing import pair
from fcmae.train.distributed import pick_device

# Each module has refusal(subject), measure(subject, images, settings), draw(results) and say(name, found).
WHATS: dict[str, ModuleType] = {
    "cosine-distance": cosine_distance,
    "activations": activations,
    "attention-distance": attention_distance,
    "position-similarity": position_similarity,
    "filters": filters,
    "receptive-field": receptive_field,
    "mask-sensitivity": mask_sensitivity,
    "cka": cka,
}
EPILOG = """RUN_OR_WEIGHTS is a run's folder or checkpoint, the folder of a comparison (its arms), any file that
fcmae.convert reads, or timm:NAME with timm's pretrained weights (HF_HUB_OFFLINE=1 looks in the local cache alone).
NAME@random of any of these has random weights, of a run those that its seed gives."""


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0, or 2 with one line for bad input."""
    parser = argparse.ArgumentParser("python -m fcmae.analyze", description=__doc__.splitlines()[0], epilog=EPILOG)
    parser.add_argument(
        "subjects", nargs="+", metavar="RUN_OR_WEIGHTS", help="what to look into; several in one figure"
    )
    parser.add_argument("--what", nargs="+", required=True, metavar="WHAT", help=f"one or more of {', '.join(WHATS)}")
    parser.add_argument("--images", help="folder, list, shards, or sample; default: the images of the first run")
    parser.add_argument("--out", type=Path, required=True, help="folder for WHAT.png, WHAT.json and tensorboard/")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="images to look at; default 64")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="at a time; default 16")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PX",
        help="one number or height and width; default the subject's own",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--seed", type=int, default=0, help="of masks, and of random weights that no run tells; default 0"
    )
    parser.add_argument("--labels", nargs="+", metavar="NAME", help="what to call the subjects")
    given = parser.parse_args(argv)
    try:
        analyze(given, say=print)
    except (UsageError, OSError) as error:
        print(f"fcmae.analyze: error: {error}", file=sys.stderr)
        return 2
    return 0


def analyze(given: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Analyse as the command line says. Raises UsageError for bad input; what is there then stays as it was."""
    if unknown := [what for what in given.what if what not in WHATS]:
        raise UsageError(f"--what {unknown[0]!r} is unknown{nearest(unknown[0], WHATS)}; known: {', '.join(WHATS)}")
    for name in ("count", "batch_size"):
        if getattr(given, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(given, name)} will not do: it must be 1 or more")
    if given.seed < 0:
        raise UsageError(f"--seed {given.seed} will not do: it must be 0 or more")
    whats = list(dict.fromkeys(given.what))
    check_out(given.out, whats)
    device = pick_device(given.device)
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    subjects = open_subjects(given.subjects, given.labels, pair(given.image_size), device, given.seed)
    plans = {what: plan(what, subjects) for what in whats}
    images = read_images(given.images, subjects, given.count)
    for line in images.say(given.count):
        say(line)
    sizes = {subject.image_size for subject in subjects}
    if len(sizes) > 1:
        said = ", ".join(f"{s.label} {s.image_size[0]} x {s.image_size[1]}" for s in subjects)
        say(f"images of different sizes: {said}; --image-size gives all the same")
    for subject in subjects:
        check_features(subject, images.tensors[subject.label][:1])
    for what, (able, left_out) in plans.items():
        say(f"{what}:")
        for label, reason in left_out.items():
            say(f"  {label} left out: {reason}")
        results = measured(WHATS[what], able, images, given)
        for label, found in results.items():
            say(f"  {label}: {WHATS[what].say(label, found)}")
        report = {
            "settings": {key: value for key, value in vars(given).items() if key in ("count", "batch_size", "seed")}
            | {"device": str(device)},
            "images": images.about(),
            "subjects": {subject.label: subject.about() for subject in able},
            "left_out": left_out,
            "results": results,
        }
        with matplotlib.rc_context({"text.parse_math": False}):  # a label is a name, whatever is in it
            figure = WHATS[what].draw(results)
        say(f"  look: {write(given.out, what, report, figure)}")


def check_features(subject: Subject, images: Tensor) -> None:
    """Raises UsageError where the network cannot encode such images, or makes of them what is not finite."""
    try:
        where = first_nonfinite(subject.network, images.to(subject.device))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        h, w = subject.image_size
        raise UsageError(
            f"{subject.label} cannot encode images of {h} x {w}: {reason}; try another --image-size"
        ) from None
    if where:
        raise UsageError(
            f"{subject.label}: features are NaN or infinite from {where} on, so nothing of it can be measured"
        )


def plan(what: str, subjects: list[Subject]) -> tuple[list[Subject], dict[str, str]]:
    """The subjects that can be analysed so, and why each other one cannot. Raises UsageError where none can."""
    reasons = {subject.label: WHATS[what].refusal(subject) for subject in subjects}
    left_out = {label: reason for label, reason in reasons.items() if reason}
    able = [subject for subject in subjects if subject.label not in left_out]
    if hasattr(WHATS[what], "PAIRS") and len(able) > 2:
        raise UsageError(f"--what {what} compares two subjects, or one with itself; there are {len(able)}")
    if not able:
        raise UsageError(f"--what {what}: {'; '.join(f'{label}: {reason}' for label, reason in left_out.items())}")
    return able, left_out


def measured(module: ModuleType, able: list[Subject], images: Images, given: argparse.Namespace) -> dict[str, dict]:
    """What the module finds in each subject, or of a module of pairs in the two, or in the one held against itself."""
    if hasattr(module, "PAIRS"):
        first, second = able[0], able[-1]
        both = images.tensors[first.label], images.tensors[second.label]
        return {f"{first.label} and {second.label}": module.measure(first, second, both, given)}
    return {subject.label: module.measure(subject, images.tensors[subject.label], given) for subject in able}


if __name__ == "__main__":
    sys.exit(main())
