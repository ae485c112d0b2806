"""Losses that spike, and steps that are not made, in real runs."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
import torch

from fcmae import config as settings
from fcmae.pretrain import main, steps_of
from fcmae.schema import Config
from fcmae.train import checks, family
from fcmae.train.distributed import World
from fcmae.train.loop import StopSignal
from fcmae.train.spikes import LEAST, TRIES
from small_runs import CONFIG, assert_same_run, final_state, make_pictures, metrics


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """40 pictures, of which one has pixels so bright that its loss is a spike wherever it is seen; a configuration."""
    folder = tmp_path_factory.mktemp("numerics")
    make_pictures(folder / "pictures", 39)
    np.save(folder / "pictures" / "bright.npy", np.full((96, 96, 3), 30.0, dtype=np.float32))
    (folder / "config.yaml").write_text(CONFIG + "loss: {norm_pix: false}\ncheckpoint: {every: 4}\n")
    return folder


def arguments(place, out, *overrides):
    return [str(place / "config.yaml"), f"data.source={place / 'pictures'}", f"out={out}", *overrides]


def stop_at(step, given):
    """A run that is told to end when it has made so many steps: it makes one more and saves."""
    config = settings.load(Config, given[0], given[1:])
    checks.check(config)
    family.fill(config)
    stop = StopSignal()
    for progress in steps_of(config, World(0, 1, torch.device("cpu")), stop):
        if progress.step == step:
            stop.received = 15


@pytest.fixture(scope="module")
def guarded(place):
    assert main(arguments(place, place / "guarded", "train.spike_factor=3", "train.steps=40")) == 0
    return place / "guarded"


def test_without_the_guard_the_loss_spikes(place, tmp_path):
    assert main(arguments(place, tmp_path / "run", "train.steps=40")) == 0
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert sum(loss > 3 * statistics.median(losses) for loss in losses[LEAST:]) >= 3  # once an epoch of 5 steps


def test_a_spike_sends_the_run_back_and_past_its_images(guarded):
    rows = metrics(guarded)
    assert [row["step"] for row in rows] == list(range(1, 41))
    losses = [row["loss"] for row in rows]
    assert max(losses[LEAST:]) < 3 * statistics.median(losses)
    state = final_state(guarded)
    assert rows[-1]["rollbacks"] == state["rollbacks"] >= 3
    # Each time the images from the checkpoint to the spike were passed over.
    assert state["rollbacks"] <= state["ahead"] <= 4 * state["rollbacks"] and len(state["recent"]) == 40
    assert "rollbacks" not in rows[LEAST - 1]


@pytest.mark.parametrize("stopped_at", [22, 30])
def test_stopped_and_continued_it_goes_back_at_the_same_steps(place, guarded, tmp_path, stopped_at):
    out, overrides = tmp_path / "run", ("train.spike_factor=3", "train.steps=40")
    stop_at(stopped_at, arguments(place, out, *overrides))
    assert main(arguments(place, out, *overrides)) == 0
    assert_same_run(out, guarded)
    assert final_state(out)["ahead"] == final_state(guarded)["ahead"]


@pytest.mark.parametrize("branch", [False, True])
def test_it_goes_back_to_what_a_signal_saved_where_there_is_nothing_else(place, tmp_path, capsys, branch):
    out, overrides = tmp_path / "run", ("train.steps=40", "checkpoint.every=1000")
    stop_at(6, arguments(place, out, *overrides))
    if branch:
        (out / "checkpoints" / "step_000000007.pt").rename(tmp_path / "seven.pt")
        out = tmp_path / "branch"
        overrides = (*overrides, f"resume={tmp_path / 'seven.pt'}")
    assert main(arguments(place, out, *overrides, "train.spike_factor=3")) == 2  # five steps bring one
    said = capsys.readouterr()
    assert said.out.count("back to step 7, and on past") == TRIES
    assert f"went back to its checkpoint of step 7 {TRIES} times" in said.err


def test_a_run_that_gets_no_further_says_so(place, tmp_path, capsys):
    status = main(arguments(place, tmp_path / "run", "train.spike_factor=1.0001", "train.steps=60"))
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    assert f"{TRIES} times and got no further" in error and "train.spike_factor=1.0001 times" in error


def test_skipped_steps_are_listed_and_leave_running_statistics_alone(place, tmp_path, capsys):
    make_pictures(tmp_path / "pictures", 39)
    np.save(tmp_path / "pictures" / "poison.npy", np.full((96, 96, 3), 3e38, dtype=np.float32))
    overrides = (f"data.source={tmp_path / 'pictures'}", "model.norm=bn", "train.steps=10")
    assert main(arguments(place, tmp_path / "run", *overrides)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in metrics(tmp_path / "run") if row.get("skipped")]
    for row in rows:
        assert len(row["images"]) == 8 and str(tmp_path / "pictures" / "poison.npy") in row["images"]
        assert row["layer"] in final_state(tmp_path / "run")["model"]
    assert "skipped.jsonl in the run folder has them all" in capsys.readouterr().out
    state = final_state(tmp_path / "run")
    tracked = [key for key in state["model"] if key.endswith("running_mean")]
    assert tracked and all(torch.isfinite(state["model"][key]).all() for key in tracked)
    assert {int(x) for key, x in state["model"].items() if key.endswith("num_batches_tracked")} == {8}
