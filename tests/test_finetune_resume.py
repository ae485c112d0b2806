"""Killed at any instant, a fine-tuning resumes to the same weights, average and best score, bit for bit."""

import os
import random
import shutil
import signal
import threading
import time

import pytest
import timm
import torch

from fcmae.finetune import main
from fcmae.probe import main as probe
from labelled_runs import arguments, assert_same_outcome, make_place, results, start
from small_runs import final_state

SETTINGS = ("checkpoint.every=3", "data.workers=1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The place and the uninterrupted run."""
    place = make_place(tmp_path_factory.mktemp("resume"))
    assert main(arguments(place, place / "whole", *SETTINGS)) == 0
    return place, place / "whole"


def lines(path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def kill_at(given: list[str], metrics, step: int, pause: float) -> None:
    """SIGKILL a run `pause` seconds after its metrics have reached a step."""
    process = start("fcmae.finetune", given)
    deadline = time.monotonic() + 100
    while lines(metrics) < step and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    time.sleep(pause)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors[-2000:]


@pytest.mark.slow
def test_killed_in_the_middle(whole, tmp_path):
    place, done = whole
    rng = random.Random(0)
    kill_at(arguments(place, tmp_path / "k", *SETTINGS), tmp_path / "k" / "metrics.jsonl", rng.randint(5, 15), 0.01)
    assert not (tmp_path / "k" / "results.json").exists()
    assert main(arguments(place, tmp_path / "k", "checkpoint.every=3")) == 0
    assert_same_outcome(tmp_path / "k", done)


def test_a_signal_saves_before_leaving(whole, tmp_path, capsys):
    place, done = whole
    out = tmp_path / "s"

    def stop():
        while lines(out / "metrics.jsonl") < 7:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert main(arguments(place, out, "checkpoint.every=1000")) == 128 + signal.SIGTERM
    thread.join()
    step = final_state(out)["step"]
    assert 7 <= step < 20 and f"saved at step {step}" in capsys.readouterr().out
    assert main(arguments(place, out)) == 0
    assert_same_outcome(out, done)


def test_what_lies_between_the_last_checkpoint_and_the_results_is_made_again(whole, tmp_path):
    """A run killed right after its last checkpoint: only the exports are missing, and the best score is remembered."""
    place, done = whole
    out = tmp_path / "e"
    assert main(arguments(place, out)) == 0
    for name in ("results.json", "last.safetensors", "ema.safetensors", "curve.png"):
        (out / name).unlink()
    before = (out / "best.safetensors").stat().st_mtime_ns
    assert main(arguments(place, out)) == 0
    assert_same_outcome(out, done)
    assert results(out)["best"] == results(done)["best"]
    assert (out / "best.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_damaged_best_weights_are_said_and_made_anew(whole, tmp_path, capsys):
    place, _ = whole
    out = tmp_path / "d"
    assert main(arguments(place, out, "checkpoint.every=5")) == 0
    (out / "results.json").unlink()
    sorted((out / "checkpoints").iterdir())[-1].unlink()
    data = (out / "best.safetensors").read_bytes()
    (out / "best.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    capsys.readouterr()
    assert main(arguments(place, out, "checkpoint.every=5")) == 0
    assert "best.safetensors is damaged" in capsys.readouterr().out
    assert main([*arguments(place, tmp_path / "e", "--eval", init=None), f"init={out}"]) == 0


def test_a_complete_run_is_left_alone(whole, capsys):
    place, done = whole
    before = {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file() and p.name != ".lock"}
    assert main(arguments(place, done, *SETTINGS)) == 0
    assert "complete" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.slow
def test_branching_off_goes_on_with_optimizer_and_average(whole, tmp_path):
    """resume=FILE out=NEW: the first step after it is that of the run it came from."""
    place, done = whole
    out = tmp_path / "b"
    assert main(arguments(place, out, "train.steps=12", "checkpoint.every=9")) == 0  # its own, shorter schedule
    branch = out / "checkpoints" / "step_000000009.pt"
    more = (f"resume={branch}", "train.steps=12", "checkpoint.every=9")
    assert main(arguments(place, tmp_path / "n", *more, init=None)) == 0
    assert (tmp_path / "n" / "best.safetensors").is_file() and results(tmp_path / "n")["best"]["step"] == 12
    for name in ("model", "ema"):
        a, b = final_state(out)[name], final_state(tmp_path / "n")[name]
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_lars_resumes_too(whole, tmp_path):
    place, _ = whole
    more = ("train.optimizer=lars", "train.steps=6", "checkpoint.every=3")
    for out, steps in (("a", 6), ("b", 6)):
        assert main(arguments(place, tmp_path / out, *more, f"train.steps={steps}")) == 0
    (tmp_path / "b" / "checkpoints" / "step_000000006.pt").unlink()
    for name in ("results.json", "last.safetensors"):
        (tmp_path / "b" / name).unlink()
    assert main(arguments(place, tmp_path / "b", *more)) == 0
    assert_same_outcome(tmp_path / "b", tmp_path / "a")


def test_what_cannot_go_on_is_one_line(whole, tmp_path, capsys):
    """A finished run branched off without more steps, other classes, and a probe that began with other weights."""
    place, done = whole
    end, out = f"resume={done}/checkpoints/step_000000020.pt", tmp_path / "out"
    assert main(arguments(place, out, end, init=None)) == 2
    assert "is at the end of this run" in capsys.readouterr().err
    few = tmp_path / "few"
    shutil.copytree(place / "shapes" / "train", few)
    for i, path in enumerate(sorted((few / "bars").iterdir())):
        path.rename(few / "disc" / f"more_{i}.png")
    (few / "bars").rmdir()
    val = tmp_path / "val"
    shutil.copytree(place / "shapes" / "val", val)
    shutil.rmtree(val / "bars")
    fewer = arguments(place, out, end, f"data.train={few}", f"data.val={val}", "train.steps=30", init=None)
    assert main(fewer) == 2
    said = capsys.readouterr().err
    assert "head" in said and "in this model" in said and said.count("\n") == 1
    short = ("train.steps=4", "train.warmup_epochs=0", "checkpoint.every=2", "data.mixup=0", "data.cutmix=0")
    assert probe(arguments(place, tmp_path / "p", *short)) == 0
    kept = tmp_path / "p" / "checkpoints" / "step_000000002.pt"
    other = timm.create_model("convnextv2_atto", num_classes=0, depths=[1, 1, 2, 1], dims=[8, 12, 16, 24])
    torch.save(other.state_dict(), tmp_path / "other.pt")
    again = arguments(place, out, f"resume={kept}", f"init={tmp_path / 'other.pt'}", *short, init=None)
    assert probe(again) == 2
    assert "has other frozen weights than init=" in capsys.readouterr().err
    assert not out.exists()
