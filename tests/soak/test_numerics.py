"""Losses, gradients and images that are not finite, on any rank: skipped by all, named; enough of them stop a run."""

import itertools
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from small_runs import CONFIG, environment, final_state, make_pictures, metrics

pytestmark = pytest.mark.soak
LAYERS = (
    *("encoder.stem.0.weight", "encoder.stages.2.blocks.0.mlp.fc1.weight", "encoder.stages.3.blocks.0.mlp.grn.weight"),
    *("encoder.stages.0.blocks.0.conv_dw.weight", "decoder.0.norm.weight", "pred.bias"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """39 pictures and one of numbers too large to compute with; the names of the model's parameters."""
    folder = tmp_path_factory.mktemp("numerics")
    make_pictures(folder / "good", 40)
    make_pictures(folder / "pictures", 39)
    np.save(folder / "pictures" / "huge.npy", np.full((96, 96, 3), 3e38, dtype=np.float32))
    (folder / "config.yaml").write_text(CONFIG.replace("batch_size: 8", "batch_size: 4, effective_batch: 8"))
    return folder


def start(place: Path, out: Path, faults: list[dict], *overrides: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """A run of `faulty.py` to its end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.json"
    file.write_text(json.dumps(faults))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    script = str(Path(__file__).with_name("faulty.py"))
    return subprocess.run(
        [sys.executable, *torchrun, script, str(file), str(place / "config.yaml"), f"out={out}", *overrides],
        env=environment(), capture_output=True, text=True, timeout=1800,
    )  # fmt: skip


def rows_of(out: Path) -> list[dict]:
    file = out / "skipped.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_whatever_is_not_finite_is_skipped_by_all_and_named(place, tmp_path, often, figures):
    """One fault in four steps, of each kind on each rank, in a run of many; besides, once an epoch the huge image."""
    steps, seed = often(800, 40), 20261122
    rng = random.Random(seed)
    faults = []
    for step in range(2, steps, 4):
        kind = rng.choice(["loss", "gradient"])
        faults.append({"step": step, "rank": rng.randrange(2), "kind": kind, "layer": rng.choice(LAYERS)})
    out = tmp_path / "run"
    more = (f"data.source={place / 'pictures'}", f"train.steps={steps}", "train.max_nonfinite=5")
    done = start(place, out, faults, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, found = metrics(out), {row["step"]: row for row in rows_of(out)}
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert skipped == sorted(found) and len(skipped) == final_state(out)["skipped"] == done.stdout.count("step skipped")
    planted = {fault["step"]: fault for fault in faults}
    assert set(planted) <= set(found), seed
    huge = str(place / "pictures" / "huge.npy")
    for step, row in found.items():
        fault = planted.get(step, {"kind": "image"})
        with_huge = huge in row["images"]
        if fault["kind"] == "gradient" and not with_huge:
            assert row["layer"] == fault["layer"] and row["images"] == [], (seed, fault, row)
        elif fault["kind"] == "loss" or with_huge:
            assert len(row["images"]) in (4, 8) and row["layer"] in final_state(out)["model"], (seed, fault, row)
        else:
            raise AssertionError((seed, step, row))
    seen = sum(huge in row["images"] for row in found.values())
    assert abs(seen - steps * 8 / 40) <= 1  # once an epoch
    ours, theirs = (weights_of(out, rank) for rank in range(2))
    assert ours == theirs and unchanged(ours) == skipped
    assert all(torch.isfinite(x).all() for x in final_state(out)["model"].values())
    kinds = {kind: sum(fault["kind"] == kind for fault in faults) for kind in ("loss", "gradient")}
    figures("not_finite", steps=steps, **kinds, images=seen, skipped=len(skipped), ranks=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_enough_in_a_row_stop_every_rank_and_leave_the_checkpoint(place, tmp_path, rank, often, figures):
    if often(False, True):
        return
    faults = [{"step": step, "rank": rank, "kind": "loss"} for step in (3, 6, 7, 8)]
    more = (f"data.source={place / 'good'}", "train.steps=20", "train.max_nonfinite=3", "checkpoint.every=5")
    done = start(place, tmp_path / "run", faults, *more)
    assert done.returncode != 0
    error = [line for line in done.stderr.splitlines() if "fcmae.pretrain: error: " in line]
    assert error and "3 steps in a row were skipped, the last checkpoint is intact" in error[0], done.stderr[-3000:]
    state = final_state(tmp_path / "run")
    assert state["step"] == 5 and state["skipped"] == 1
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [3, 6, 7, 8]
    again = start(place, tmp_path / "run", [], *more)
    assert again.returncode == 0 and "going on from step 5" in again.stdout
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [3]  # what followed the checkpoint was done again
    figures(f"stopped_by_rank_{rank}", in_a_row=3, from_checkpoint=5)


def test_overflow_of_fp16_moves_the_scaler_alone(place, tmp_path, often, figures):
    steps = often(800, 50)
    planted = list(range(10, steps, 40))
    faults = [{"step": step, "rank": 0, "kind": "scale"} for step in planted]
    more = (f"data.source={place / 'good'}", f"train.steps={steps}", "train.precision=fp16", "train.batch_size=8")
    done = start(place, tmp_path / "run", faults, *more, ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics(tmp_path / "run")
    skipped = [row for row in rows if row.get("skipped")]
    assert {row["step"] for row in skipped} >= set(planted)
    assert all(row["loss"] is not None for row in skipped) and rows_of(tmp_path / "run") == []
    assert "step skipped" not in done.stdout
    before = {row["step"]: row["loss_scale"] for row in rows}
    follows = [row for row in skipped if row["step"] - 1 in before and row["step"] not in planted]
    assert all(row["loss_scale"] == before[row["step"] - 1] / 2 for row in follows)
    assert unchanged(weights_of(tmp_path / "run", 0)) == [row["step"] for row in skipped]
    assert all(torch.isfinite(x).all() for x in final_state(tmp_path / "run")["model"].values())
    figures("fp16_overflow", steps=steps, overflows=len(planted), skipped=len(skipped))


@pytest.mark.parametrize(
    "ranks,overrides", [(2, []), (2, ["train.sharding=full"]), (1, ["train.precision=fp16", "train.batch_size=8"])]
)
def test_a_spike_sends_every_rank_back(place, tmp_path, ranks, overrides, often, figures):
    """Of an image whose pixels are too bright wherever it is seen."""
    if overrides and often(False, True):
        return
    make_pictures(tmp_path / "pictures", 39)
    np.save(tmp_path / "pictures" / "bright.npy", np.full((96, 96, 3), 30.0, dtype=np.float32))
    steps, out = often(120, 40), tmp_path / "run"
    more = (f"data.source={tmp_path / 'pictures'}", "loss.norm_pix=false", "checkpoint.every=4", f"train.steps={steps}")
    done = start(place, out, [], *more, *overrides, "train.spike_factor=3", ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, state = metrics(out), final_state(out)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    losses = [row["loss"] for row in rows if not row.get("skipped")]  # a step that overflows fp16 is not made anyway
    assert max(losses[20:]) < 3 * statistics.median(losses) and state["rollbacks"] >= 3
    assert done.stdout.count("and on past the images of") == state["rollbacks"]
    if ranks == 2 and not overrides:
        assert weights_of(out, 0) == weights_of(out, 1)
    name = f"spikes_on_{ranks}_ranks" + "".join(f"_{word.partition('=')[2]}" for word in overrides[:1])
    figures(name, steps=steps, rollbacks=state["rollbacks"], steps_passed_over=state["ahead"])


def weights_of(out: Path, rank: int) -> list[str]:
    """Digests of a rank's weights before each forward pass and at the end."""
    return json.loads((out / f"weights_{rank}.json").read_text())


def unchanged(weights: list[str]) -> list[int]:
    """The steps that left the weights as they were, but for the first, whose learning rate is 0."""
    return [step for step, (before, after) in enumerate(itertools.pairwise(weights), 1) if before == after and step > 1]
