"""Real runs over images of which many are broken or odd: they go on, name each broken one once, and no other."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import labelled_runs
import small_runs
from fcmae import pretrain
from fcmae.data import open_source
from fcmae.errors import one_line
from fcmae.train import checkpoint
from soak.odd_images import AS_OTHERS, BOMBS, Corpus, black

pytestmark = pytest.mark.soak
SEED, BATCH = 4_711, 16
# What a bomb may add to a worker's memory: nothing, as its header alone is read; this is for the allocator's moods.
ALLOWANCE = 128 * 2**20
# And the largest image that is not refused, 89.5 million pixels: its pixels as they are, with an alpha channel, laid on
# white, and in the colours that the model takes, each once or twice.
BYTES_PER_PIXEL = 24
FULL = {
    "": 16, "whole": 500, "truncated": 150, "flipped": 260, "flipped_exif": 60, "turned": 60, "misnamed": 40,
    "cmyk": 40, "animated": 30, "tiny": 40, "modes": 60, "array": 30, "bomb": 4,
}  # fmt: skip
SHORT = {"": 2, "whole": 60, "truncated": 14, "flipped": 24, "flipped_exif": 6, "turned": 8, "modes": 8, "bomb": 1}
NAME = re.compile(r"(?s)(.*?\.(?:jpg|jpeg|png|webp|gif|npy)): ", re.IGNORECASE)


def corpus(folder: Path, counts: dict[str, int], without: tuple[str, ...] = ()) -> Corpus:
    return Corpus(folder, SEED).fill(counts | dict.fromkeys(without, 0))


def run(command: str, given: list[str], watch: Callable[[int], None] | None = None) -> tuple[int, str, str]:
    """The command to its end, within minutes; watch: called with its process's number ten times a second."""
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        process = subprocess.Popen(
            [*AS_OTHERS, sys.executable, "-m", f"fcmae.{command}", *given],
            env=small_runs.environment(), stdout=out, stderr=err,
        )  # fmt: skip
        deadline = time.monotonic() + 1800
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"{command} {given} hangs")
            if watch is not None:
                watch(process.pid)
            time.sleep(0.1)
        out.seek(0)
        err.seek(0)
        return process.returncode, out.read(), err.read()


class Peak:
    """The largest resident size, in bytes, that any child of a process came to, its loader workers."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, parent: int) -> None:
        for child in _children(parent):
            try:
                status = Path(f"/proc/{child}/status").read_text()
            except OSError:
                continue
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                self.bytes = max(self.bytes, 1024 * int(found[1]))


def _children(parent: int) -> list[str]:
    try:
        return [c for task in Path(f"/proc/{parent}/task").iterdir() for c in (task / "children").read_text().split()]
    except OSError:
        return []


def settings(place: Path, source: Path, out: Path, steps: int) -> list[str]:
    """A tiny model, two workers."""
    config = place / "config.yaml"
    config.write_text(small_runs.CONFIG)
    return [
        str(config), f"data.source={source}", f"out={out}", f"train.steps={steps}", f"train.batch_size={BATCH}",
        "data.workers=2", "train.warmup_epochs=0", "log.collapse_every=0", "log.print_every=1000",
        "data.max_bad_share=1", "sparse.backend=reference",
    ]  # fmt: skip


def named(out: Path) -> list[str]:
    """The files that bad_images.txt names, in its order."""
    path = out / "bad_images.txt"
    return [NAME.match(line)[1] for line in path.read_text().splitlines()] if path.exists() else []


def check_names(out: Path, bad: set[str]) -> None:
    names, expected = named(out), {one_line(path) for path in bad}
    assert len(names) == len(set(names)), "one is named twice"
    assert set(names) == expected, f"wrongly: {set(names) - expected}, not: {expected - set(names)}"


def replaced(names: list[str], bad: set[str], steps: int) -> int:
    """How many reads fail in so many steps, by the documented order of images and of those that replace them."""
    count, order, drawn = 0, np.empty(0), -1
    for position in range(steps * BATCH):
        epoch, place = divmod(position, len(names))
        if epoch != drawn:
            drawn, order = epoch, np.random.default_rng([0, epoch]).permutation(len(names))
        index = int(order[place])
        spare = np.random.default_rng(np.random.SeedSequence([0, epoch, index]).spawn(3)[2])
        while names[index] in bad:
            count += 1
            index = int(spare.integers(len(names)))
    return count


def test_pretraining_goes_on_over_broken_and_odd_images(tmp_path, often, figures):
    counts, peaks = FULL if often(1, 0) else SHORT, {}
    for label, without in (("with", ()), ("without", BOMBS)):
        images, out, peak = corpus(tmp_path / label, counts, without), tmp_path / f"run-{label}", Peak()
        names = [open_source(str(images.folder), 3).name(i) for i in range(len(images.good | images.bad))]
        assert set(names) == images.good | images.bad
        steps = -(-len(names) // BATCH) + 2  # each once, and a few again
        status, said, err = run("pretrain", settings(tmp_path, images.folder, out, steps), peak)
        assert status == 0, err[-3000:]
        check_names(out, images.bad)
        newest, passed_over = checkpoint.find_newest(out / "checkpoints")
        state = checkpoint.read(newest)
        assert (state["step"], passed_over) == (steps, [])
        assert state["bad_images"] == replaced(names, images.bad, steps)
        assert all(np.isfinite(row["loss"]) for row in small_runs.metrics(out))
        peaks[label] = peak.bytes
        if label == "with":
            odd = len(names) - counts["whole"]
            assert odd >= often(1000, 50)
            found = {"files": len(names), "broken_or_odd": odd, "broken": len(images.bad), "steps": steps,
                     "bad_reads": state["bad_images"],
                     "bombs": sum(counts.get(k, counts[""]) for k in BOMBS)}  # fmt: skip
    assert 0 < peaks["with"] <= peaks["without"] + ALLOWANCE, peaks
    mib = {f"worker_peak_mib_{label}_bombs": peak // 2**20 for label, peak in peaks.items()}
    figures("odd_images", **found, **mib, allowance_mib=ALLOWANCE // 2**20)


def test_the_largest_image_that_is_not_refused(tmp_path, often, figures):
    """One of 9,459 x 9,459 pixels with an alpha channel, in a process of its own."""
    side = often(9_459, 3_000)
    (tmp_path / "x.png").write_bytes(black(side, side, 8, 4))
    code = (
        "import resource, sys; from fcmae.data.decode import read_image; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; before = peak(); "
        "shape = tuple(read_image(sys.argv[1], 3).shape); print(*shape, peak() - before)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "x.png")]
    done = subprocess.run(words, capture_output=True, text=True, env=small_runs.environment())
    *shape, grown = map(int, done.stdout.split())
    assert shape == [3, side, side], done.stderr
    assert grown <= BYTES_PER_PIXEL * side * side
    figures("largest_image", side=side, grown_mib=grown // 2**20, bytes_per_pixel=round(grown / side**2, 1))


def test_a_small_share_stops_the_run(tmp_path, figures):
    images = corpus(tmp_path / "images", {"": 1, "whole": 90, "text": 20})  # too few for the first step to stop it
    out = tmp_path / "run"
    given = [*settings(tmp_path, images.folder, out, 200), "data.max_bad_share=0.01", "checkpoint.every=1"]
    given = [word for word in given if word != "data.max_bad_share=1"]
    for again in (False, True):  # the same command goes on from the last checkpoint, and is stopped again
        status, said, err = run("pretrain", given)
        assert status == 2 and len(err.strip().splitlines()) == 1, err
        assert re.search(r"1[1-9] of \d+ images read were unreadable, more than data.max_bad_share=0.01; bad_im", err)
        newest, passed_over = checkpoint.find_newest(out / "checkpoints")
        state = checkpoint.read(newest)
        assert passed_over == [] and state["bad_images"] <= 10 and state["step"] == int(newest.stem[5:]), again
        names = named(out)
        assert len(names) == len(set(names)) > 5 and set(names) <= {one_line(p) for p in images.bad}
    figures("share_of_bad_images", stopped_after=err.split("error: ")[1].split(" images")[0], status=status)


def test_images_that_vanish_while_a_run_reads(tmp_path, often, figures):
    images = corpus(tmp_path / "images", {"": 0, "whole": often(400, 96)})
    paths, rng, out = sorted(images.good), random.Random(SEED), tmp_path / "run"
    gone = rng.sample(paths, len(paths) // 3)
    waiting, steps = list(gone), 4 * len(paths) // BATCH

    def vanish(pid: int) -> None:
        lines = out / "metrics.jsonl"
        if lines.exists() and lines.read_bytes().count(b"\n") > 1:
            for path in [waiting.pop() for _ in range(min(len(waiting), 20))]:
                if rng.random() < 0.7:
                    os.unlink(path)
                else:  # it is only half there from now on
                    os.truncate(path, os.path.getsize(path) // 2)

    given = [*settings(tmp_path, images.folder, out, steps), "train.accum_steps=1"]
    status, said, err = run("pretrain", given, vanish)
    assert status == 0, err[-3000:]
    assert not waiting, "the run was over before the last one vanished"
    names = named(out)
    assert len(names) == len(set(names)) and set(names) <= set(gone)
    assert len(names) > 0.5 * len(gone), "hardly any of them was read again"
    figures("vanishing_images", files=len(paths), vanished_or_cut=len(gone), named=len(names))


def test_fine_tuning_and_probing_on_labelled_folders_with_broken_images(tmp_path, often, figures):
    labelled_runs.make_place(tmp_path)
    found, counts = {}, {"": often(3, 1), "truncated": often(20, 4), "flipped": often(20, 4), "whole": often(60, 8)}
    for part in ("train", "val"):
        for folder in sorted((tmp_path / "shapes" / part).iterdir()):
            found[part, folder.name] = corpus(folder / "more", counts, ("folder",))
    bad = {part: set().union(*(c.bad for (p, _), c in found.items() if p == part)) for part in ("train", "val")}
    total = {part: sum(len(c.good | c.bad) for (p, _), c in found.items() if p == part) + 46 for part in bad}
    out, steps = tmp_path / "run", -(-total["train"] // 8) + 1
    given = labelled_runs.arguments(
        tmp_path, out, *labelled_runs.PLAIN, f"train.steps={steps}", "data.workers=2", "data.max_bad_share=1",
        "train.warmup_epochs=0", "eval.every=100",
    )  # fmt: skip
    status, said, err = run("finetune", given)
    assert status == 0, err[-3000:]
    check_names(out, bad["train"])
    last = labelled_runs.validations(out)[-1]["model"]
    assert last["unreadable"] == len(bad["val"])
    knn = ("probe.mode=knn", "probe.neighbours=[3]", "data.workers=2")
    probed = labelled_runs.arguments(tmp_path, tmp_path / "probe", *knn)
    status, said, err = run("probe", probed)
    assert status == 0, err[-3000:]
    results = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert results["unreadable"] == len(bad["train"]) + len(bad["val"])
    figures("odd_labelled_images", train=total["train"], bad_train=len(bad["train"]), bad_val=len(bad["val"]))


def test_shards_and_lists_with_broken_images(tmp_path, capsys, often, figures):
    counts = {"": 1, "whole": often(120, 40), "truncated": 10, "flipped": 20}
    images = corpus(tmp_path / "images", counts, ("huge", "unreadable"))  # the second in a shard is not
    regular = sorted(p for p in images.good | images.bad if os.path.isfile(p) and not os.path.islink(p))
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for path in regular:
            tar.add(path, os.path.relpath(path, images.folder))
    lines = [p for p in regular if p == one_line(p)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    inside = {f"{shard}/{os.path.relpath(p, images.folder)}" for p in images.bad & set(regular)}
    listed = images.bad & set(lines)
    for source, count, bad in ((shard, len(regular), inside), (tmp_path / "list.txt", len(lines), listed)):
        out = tmp_path / f"run-{source.name}"
        status, said, err = run("pretrain", settings(tmp_path, source, out, -(-count // BATCH)))
        assert status == 0, err[-3000:]
        check_names(out, bad)
    for odd in ("dangling", "pipe", "plug"):
        [path] = [p for p in images.bad if odd.replace("plug", "socket") in p]
        (tmp_path / "odd.txt").write_text("\n".join([*lines, path]))
        status = pretrain.main(settings(tmp_path, tmp_path / "odd.txt", tmp_path / "x", 2))
        err = capsys.readouterr().err
        assert status == 2 and len(err.strip().splitlines()) == 1 and path in err, err
    figures("odd_shards_and_lists", members=len(regular), bad_members=len(inside), listed=len(lines))
