"""Killed at any instant, a run resumes to the same weights and metrics, bit for bit."""

import errno
import signal
import subprocess

import pytest
import torch

from ending import ended
from fcmae.files import write_whole
from fcmae.schema import CheckpointConfig
from fcmae.train import checkpoint
from fcmae.train.run_folder import RunFolder
from small_runs import CONFIG, assert_same_run, command, environment, final_state, make_pictures, metrics, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, its config file and its settings."""
    folder = tmp_path_factory.mktemp("resume")
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    settings = [f"data.source={make_pictures(folder / 'pictures')}", "checkpoint.every=3"]
    run(config, *settings, f"out={folder / 'whole'}")
    assert (folder / "whole" / "collapse.jsonl").read_text().count("\n") == 9  # after 0, 7, ..., 56 steps of 60
    return folder, config, settings


def test_nothing_is_dropped_while_steps_are_skipped(tmp_path):
    for step, in_a_row in ((1, 0), (2, 0), (3, 1), (4, 2), (5, 0)):
        checkpoint.save(tmp_path, {"step": step, "skipped_in_a_row": in_a_row}, CheckpointConfig(every=1, keep_last=2))
        assert checkpoint.steps_in(tmp_path) == {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 3, 4], 5: [4, 5]}[step]


def test_without_its_checkpoints_a_run_says_that_it_begins_anew(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    assert folder.find_checkpoint(None) == (None, [])
    folder.metrics.write_text('{"step": 1}\n')
    found, (warning,) = folder.find_checkpoint(None)
    assert found is None and "begins anew" in warning


def test_regular_checkpoints_come_before_those_that_a_signal_asked_for(tmp_path):
    for step in (4, 8, 10):
        checkpoint.save(tmp_path, {"step": step}, CheckpointConfig(every=4, keep_last=3))
    assert checkpoint.find_newest(tmp_path)[0].name == "step_000000010.pt"
    assert checkpoint.find_newest(tmp_path, 4)[0].name == "step_000000008.pt"
    for step in (4, 8):
        path = checkpoint.path_of(tmp_path, step)
        path.write_bytes(path.read_bytes()[:-9])
    found, damaged = checkpoint.find_newest(tmp_path, 4)
    assert found.name == "step_000000010.pt" and len(damaged) == 2
    checkpoint.drop(tmp_path, lambda step: step > 4)
    assert checkpoint.steps_in(tmp_path) == [4]


def test_another_number_of_workers_changes_nothing(whole, tmp_path):
    _, config, settings = whole
    run(config, *settings, f"out={tmp_path / 'workers'}", "data.workers=2")
    assert_same_run(tmp_path / "workers", whole[0] / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_before_leaving(whole, tmp_path, number):
    _, config, settings = whole
    out = tmp_path / "signalled"
    process = subprocess.Popen(
        command(config, *settings, f"out={out}", "checkpoint.every=1000", "data.workers=1"),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 7/"):
            process.send_signal(number)
            break
    said, errors = ended(process, 60)
    assert process.returncode == 128 + number, errors[-2000:]
    step = final_state(out)["step"]
    assert 7 <= step < 60 and metrics(out)[-1]["step"] == step
    assert f"saved at step {step}" in said
    run(config, *settings, f"out={out}", "checkpoint.every=3")
    assert_same_run(out, whole[0] / "whole")


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(whole, tmp_path):
    _, config, settings = whole
    out = tmp_path / "damaged"
    process = subprocess.Popen(
        command(config, *settings, f"out={out}"), env=environment(), stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    process.kill()
    process.communicate()
    older, newest = sorted((out / "checkpoints").glob("step_*.pt"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    said = run(config, *settings, f"out={out}").stdout
    assert "falling back" in said and newest.name in said and f"from step {int(older.stem[5:])} of" in said
    assert_same_run(out, whole[0] / "whole")


def test_a_damaged_later_checkpoint_never_crowds_out_a_good_one(tmp_path):
    payload = lambda step: {"step": step, "model": {"w": torch.full((50,), float(step))}}  # noqa: E731
    for step in (12, 15, 18):
        checkpoint.save(tmp_path, payload(step), CheckpointConfig(keep_last=2))
    newest = checkpoint.path_of(tmp_path, 18)
    newest.write_bytes(newest.read_bytes()[:-40])
    assert checkpoint.find_newest(tmp_path)[0] == checkpoint.path_of(tmp_path, 15)
    checkpoint.save(tmp_path, payload(17), CheckpointConfig(keep_last=1))
    assert checkpoint.steps_in(tmp_path) == [17]
    checkpoint.path_of(tmp_path, 17).write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 checkpoints .* can be read .*step_000000017.pt"):
        checkpoint.find_newest(tmp_path)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    whole_file = checkpoint.save(tmp_path, {"step": 1}, CheckpointConfig(keep_last=1))

    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="No space left on device"):
        write_whole(whole_file, fail)
    assert checkpoint.read(whole_file)["step"] == 1 and list(tmp_path.iterdir()) == [whole_file]


@pytest.mark.slow
def test_killed_while_claiming_its_folder_a_run_can_still_claim_it(whole, tmp_path):
    _, config, settings = whole
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").touch()
    (tmp_path / "out" / ".config.part.yaml").write_text("half")
    run(config, *settings, f"out={tmp_path / 'out'}", "train.steps=5", "train.warmup_epochs=0")
    assert len(metrics(tmp_path / "out")) == 5


@pytest.mark.slow
def test_one_process_a_folder(whole, tmp_path):
    _, config, settings = whole
    arguments = command(config, *settings, f"out={tmp_path / 'out'}", "train.steps=4000", "data.workers=1")
    first = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True)
    for line in first.stdout:
        if line.startswith("step 5/"):
            break
    second = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 2 and "another process is running in" in second.stderr
    # the lock went with the process, though its loader workers may live a moment longer
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("step ") for line in process.stdout)
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_pictures_come_each_epoch_and_an_unused_resume_is_said(whole, tmp_path):
    folder, config, settings = whole
    out = tmp_path / "out"
    short = [*settings, f"out={out}", "train.steps=5", "train.warmup_epochs=0"]
    run(config, *short, "log.images=2", "log.images_every=0.4")
    assert sorted(p.stem for p in (out / "reconstructions").iterdir()) == [f"step_{s:09d}" for s in (2, 4, 5)]
    (out / "encoder.safetensors").unlink()
    other = folder / "whole" / "checkpoints" / "step_000000060.pt"
    said = run(config, *short, f"resume={other}").stdout
    assert "is not used" in said and "step_000000005.pt" in said


def test_a_complete_run_is_left_alone(whole):
    folder, config, settings = whole

    def dates():
        files = (p for p in (folder / "whole").rglob("*") if p.is_file() and p.name != ".lock")
        return {p: p.stat().st_mtime_ns for p in files}

    before = dates()
    assert "complete" in run(config, *settings, f"out={folder / 'whole'}").stdout
    assert before == dates()


@pytest.mark.slow
def test_checkpoints_kept(whole, tmp_path):
    _, config, settings = whole
    out = tmp_path / "kept"
    run(config, *settings, f"out={out}", "checkpoint.every=4", "checkpoint.keep_every=5", "checkpoint.keep_last=3")
    steps = sorted(int(p.stem[5:]) for p in (out / "checkpoints").iterdir())
    assert steps == [20, 40, 52, 56, 60]
    said = run(config, *settings, f"out={tmp_path / 'from40'}", f"resume={out / 'checkpoints' / 'step_000000040.pt'}")
    assert "from step 40" in said.stdout
    assert (tmp_path / "from40" / "encoder.safetensors").read_bytes() == (out / "encoder.safetensors").read_bytes()
