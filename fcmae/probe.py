"""How good frozen features are: `python -m fcmae.probe CONFIG.yaml --mode MODE [key=value ...]`, with the modes linear
(a classifier on the frozen encoder), partial (the last n blocks trained, a run for each n, n = 0 is linear) and knn.

The main path, top to bottom: configuration -> the runs of each n, each by fcmae.finetune's own path with all but the
last blocks frozen, or cached features and kNN -> curve.png and results.json.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import IO

import torch

from fcmae.cli import run_command
from fcmae.downstream import checks, nearest
from fcmae.downstream.export import write_json
from fcmae.downstream.frozen import last_blocks
from fcmae.downstream.labelled import Labelled
from fcmae.downstream.settings import ProbeConfig, free_keys
from fcmae.downstream.start import build, find_start
from fcmae.files import write_whole
from fcmae.finetune import find_images, train_to_end
from fcmae.pictures import empty_figure
from fcmae.train import distributed
from fcmae.train.loop import StopSignal
from fcmae.train.run_folder import RunFolder

FORMAT = "fcmae-probe-1"
# Changed, these only measure the cached features again.
KNN_KEYS = ("probe.neighbours", "probe.temperature", "probe.decay")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input, 75 try again, 128 + n saved at signal n."""
    given = list(sys.argv[1:] if argv is None else argv)
    given = [f"probe.mode={word[7:]}" if word.startswith("--mode=") else word for word in given]
    if "--mode" in given:
        at = given.index("--mode")
        given[at : at + 2] = [f"probe.mode={''.join(given[at + 1 : at + 2])}"]
    return run_command("fcmae.probe", ProbeConfig, probe, given)


def probe(config: ProbeConfig) -> int:
    """Probe as configured; see `main` for the result. Raises UsageError for bad input."""
    checks.check(config)
    held: list = []  # the folder's lock, until this function ends
    with distributed.joined(config) as world:
        if config.probe.mode != "knn":
            return trained(config, world)
        labelled, found = encoded(config, world, held)
    if world.is_main:  # the others have nothing to wait for
        report_knn(config, labelled, found, world.device)
    return 0


def trained(config: ProbeConfig, world: distributed.World) -> int:
    """Linear probing, or a run for each number of blocks in out/blocks_N: the exit status."""
    if config.probe.mode == "linear":
        config.probe.blocks = [0.0]
        return train_to_end(config, world, StopSignal(), 0)
    spec = find_start(config).spec
    for count in config.probe.blocks:
        last_blocks(spec, count)  # whether there are so many
    folder = RunFolder(Path(config.out), (*free_keys(config), "probe.blocks"), ())
    held: list = []  # the folder's lock, until this function ends

    def look() -> None:
        held.append(folder.hold())
        folder.check(config)

    def take() -> None:
        if len(held) == 1:
            held.append(folder.claim(config, held[0], new=held[0] is None))

    world.on_main(look)
    stop = StopSignal()
    for count in config.probe.blocks:
        run = copy.deepcopy(config)
        run.probe.blocks, run.out = [count], f"{config.out}/blocks_{count:g}"
        if world.is_main:
            print(f"--- {count:g} of the last blocks trained", flush=True)
        status = train_to_end(run, world, stop, count, take)
        if status:
            return status
    world.on_main(take)
    world.on_main(lambda: report_partial(config, folder))
    return 0


def claim(folder: RunFolder, config: ProbeConfig) -> IO:
    """Make the folder this probe's; its lock."""
    held = folder.hold()
    folder.check(config)
    return folder.claim(config, held, new=held is None)


def report_partial(config: ProbeConfig, folder: RunFolder) -> None:
    """results.json and curve.png over the numbers of blocks."""
    runs = {count: RunFolder(folder.path / f"blocks_{count:g}").results for count in sorted(config.probe.blocks)}
    rows = {f"{count:g}": json.loads(path.read_text()) for count, path in runs.items()}
    found = {
        name: {key: row[key] for key in ("last", "ema", "best", "frozen_tensors_unchanged")}
        for name, row in rows.items()
    }
    tops = [100 * row["last"]["top1"] for row in rows.values()]
    draw(
        folder.path / "curve.png", list(runs), {"top-1": tops}, "blocks trained", f"partial fine-tuning: {config.init}"
    )
    write_json(folder.results, {"format": FORMAT, "mode": "partial", "init": config.init, "blocks": found})
    for name, row in found.items():
        print(
            f"{name:>4} blocks: top-1 {100 * row['last']['top1']:.2f} %, balanced {100 * row['last']['balanced']:.2f} %"
        )
    print(f"done: {folder.path}/results.json, curve.png")


def encoded(config: ProbeConfig, world: distributed.World, held: list) -> tuple[Labelled, dict]:
    """The labelled images and, on rank 0, their cached features. held: takes the folder's lock."""
    start, labelled = find_start(config), find_images(config, world)
    torch.manual_seed(config.seed)
    encoder = copy.deepcopy(config)
    if start.is_vit and not start.spec.fc_norm:
        encoder.model.pool = "token"  # the norm of the encoder, before any mean
    model = build(start, 0, encoder).to(world.device).eval()
    folder = RunFolder(Path(config.out), (*free_keys(config), *KNN_KEYS), ("features",))
    world.on_main(lambda: held.append(claim(folder, config)))
    return labelled, nearest.cached_features(model, start, config, labelled, folder.path / "features", world)


def report_knn(config: ProbeConfig, labelled: Labelled, found: dict, device: torch.device) -> None:
    """results.json and curve.png over the numbers of neighbours."""
    folder = RunFolder(Path(config.out))
    rows = nearest.measure(found, len(labelled.classes), config, device)
    ks = sorted(config.probe.neighbours)
    lines = {
        name: [100 * rows[f"knn_{k}"][key] for k in ks] for name, key in (("top-1", "top1"), ("balanced", "balanced"))
    }
    draw(folder.path / "curve.png", ks, lines, "neighbours", f"kNN: {config.init or config.model.name}")
    unreadable = found["train"][2] + found["val"][2]
    result = {
        "format": FORMAT,
        "mode": "knn",
        "init": config.init,
        "split": labelled.describe(),
        "unreadable": unreadable,
    }
    write_json(folder.results, {**result, "temperature": config.probe.temperature, **rows})
    for name, row in rows.items():
        print(f"{name:>9}: top-1 {100 * row['top1']:.2f} %, balanced {100 * row['balanced']:.2f} %")
    if unreadable:
        print(f"warning: {unreadable} images are unreadable and left out")
    print(f"done: {folder.path}/results.json, curve.png; the features are kept in {folder.path}/features")


def draw(path: Path, xs: list[float], lines: dict[str, list[float]], label: str, title: str) -> None:
    """A PNG of accuracies in percent over numbers."""
    figure, axes = empty_figure(1, 1, 5.0)
    ax = axes[0, 0]
    for name, ys in lines.items():
        ax.plot(range(len(xs)), ys, marker="o", label=name)
    ax.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    ax.set_xlabel(label)
    ax.set_ylabel("accuracy, %")
    ax.set_title(title, fontsize=9)
    ax.legend()
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))


if __name__ == "__main__":
    sys.exit(main())
