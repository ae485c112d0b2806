"""Collapse watched during pretraining: it changes nothing of training, repeats bit for bit, and warns."""

import json
import math
import signal
import subprocess

import pytest
import torch

from fcmae import config as settings
from fcmae.analysis.collapse import ALIKE, DEAD_SHARE, PROBE, collapsed, measure
from fcmae.pretrain import build_dataset, build_model
from fcmae.schema import Config
from fcmae.train import family
from fcmae.weights import read_checkpoint
from helpers import close
from small_runs import CONFIG, assert_same_run, command, environment, make_pictures, run

VIT = CONFIG.replace(
    "name: fcmae_convnextv2_atto, image_size: 64, depths: [1, 1, 1, 1], dims: [8, 12, 16, 24], decoder_dim: 16",
    "name: mae_vit_tiny_patch16, image_size: 64, dim: 24, depth: 2, heads: 2, decoder_dim: 16, decoder_depth: 1, "
    "decoder_heads: 2",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, configs, and a run of 12 steps that is not watched."""
    folder = tmp_path_factory.mktemp("collapse")
    make_pictures(folder / "pictures", 24)
    for name, text in (("config", CONFIG), ("vit", VIT)):
        (folder / f"{name}.yaml").write_text(text.replace("steps: 60", "steps: 12"))
    run(folder / "config.yaml", *given(folder, "plain", "log.collapse_every=0"))
    return folder


def given(place, name, *overrides):
    return [f"data.source={place / 'pictures'}", f"out={place / name}", "checkpoint.every=3", *overrides]


def rows(out):
    return [json.loads(line) for line in (out / "collapse.jsonl").read_text().splitlines()]


def test_watching_changes_nothing_of_training_and_is_what_a_new_measurement_finds(place):
    said = run(place / "config.yaml", *given(place, "watched", "log.collapse_every=4", "log.tensorboard=true")).stdout
    assert_same_run(place / "watched", place / "plain")
    assert not (place / "plain" / "collapse.jsonl").exists() and "features collapse" not in said
    found = rows(place / "watched")
    assert [row["step"] for row in found] == [0, 4, 8, 12]
    assert len({row["cosine_distance"] for row in found}) == 4  # each of other weights
    config = settings.load(Config, place / "config.yaml", given(place, "watched"))
    family.fill(config)
    model = build_model(config)
    dataset = build_dataset(config, model)
    model.load_state_dict(read_checkpoint(place / "watched"))
    images = torch.stack([dataset[(0, i)]["image"] for i in range(PROBE)])
    model.train()
    again = measure(model, images, 4)
    assert model.training and again["cosine_distance"] == pytest.approx(found[-1]["cosine_distance"], rel=1e-6)
    assert [layer["dead_share"] for layer in again["layers"]] == [at["dead_share"] for at in found[-1]["layers"]]


def test_features_that_are_not_finite_end_no_run_and_hide_no_collapse(place):
    config = settings.load(Config, place / "config.yaml", given(place, "nothing"))
    family.fill(config)
    model = build_model(config)
    with torch.no_grad():
        model.encoder.stages[1].blocks[0].mlp.fc2.weight[:] = 1e6 * torch.randn(1, 48)
        model.encoder.stages[2].blocks[0].mlp.fc2.weight[3, 5] = float("nan")
    found = measure(model, torch.randn(4, 3, 64, 64), 2)
    assert math.isnan(found["cosine_distance"]) and "in stage 2 block 1" in collapsed(found)


@pytest.mark.slow  # tests/test_resume.py has it too, for runs that are stopped and for a damaged checkpoint
def test_killed_and_resumed_it_is_the_same_file(place):
    """Killed after measurements that are done again."""
    out, overrides = place / "killed", ("log.collapse_every=1", "checkpoint.every=5")
    process = subprocess.Popen(
        command(place / "config.yaml", *given(place, out.name, *overrides)),
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 8/"):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    run(place / "config.yaml", *given(place, out.name, *overrides))
    assert_same_run(out, place / "plain")
    run(place / "config.yaml", *given(place, "whole", "log.collapse_every=1"))
    assert (out / "collapse.jsonl").read_bytes() == (place / "whole" / "collapse.jsonl").read_bytes()
    assert [row["step"] for row in rows(out)] == list(range(13))


@pytest.mark.parametrize("planted", ["alike", pytest.param("dead", marks=pytest.mark.slow)])
def test_a_collapse_is_one_warning(place, planted):
    config = settings.load(Config, place / "config.yaml", given(place, planted, "train.lr=0"))
    family.fill(config)
    torch.manual_seed(0)
    model = build_model(config)
    mlp = model.encoder.stages[1].blocks[0].mlp
    with torch.no_grad():
        if planted == "alike":
            mlp.fc2.weight[:] = 1e6 * mlp.fc2.weight[:1]
        else:
            mlp.fc1.bias[:30] = -1e4  # of 48
    torch.save(model.state_dict(), place / f"{planted}.pt")
    overrides = (f"init={place / planted}.pt", "train.lr=0", "log.collapse_every=3")
    lines = run(place / "config.yaml", *given(place, planted, *overrides)).stdout.splitlines()
    warned = [line for line in lines if "features collapse" in line]
    word = f"less than {ALIKE}" if planted == "alike" else f"dead in stage 2 block 1, more than {DEAD_SHARE:.0%}"
    assert len(warned) == 1 and warned[0].startswith("warning: step 0: ") and word in warned[0]
    last = rows(place / planted)[-1]
    at = {layer["layer"]: layer for layer in last["layers"]}["stage 2 block 1"]
    if planted == "alike":
        assert at["cosine_distance"] < 0.01 and collapsed(last)
    else:
        assert at["dead_share"] == pytest.approx(30 / 48) and last["dead_share"] == pytest.approx(30 / 48 / 4)


@pytest.mark.slow
@pytest.mark.parametrize("config,sharding", [("config", "none"), ("vit", "full")])
def test_two_ranks_measure_what_one_does_and_none_waits(place, config, sharding):
    overrides = ["train.effective_batch=8", "train.batch_size=4", "log.collapse_every=4", "train.steps=5"]
    name = f"{config}_{sharding}"
    run(
        place / f"{config}.yaml", *given(place, name, f"train.sharding={sharding}", *overrides, "log.images=2"),
        processes=2,
    )  # fmt: skip
    run(place / f"{config}.yaml", *given(place, f"{name}_one", *overrides))
    found, expected = rows(place / name), rows(place / f"{name}_one")
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [0, 4]
    for key in ("cosine_distance", "cosine_distance_in_mlp", "dead_share"):
        close(torch.tensor([row[key] for row in found]), torch.tensor([row[key] for row in expected]), 1e-5)
