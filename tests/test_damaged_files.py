"""Files that a bad disk changed: weights with their checksum, archives, lines of metrics."""

import json
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fcmae.checksum import KEY, checksum, read_safetensors, write_safetensors
from fcmae.errors import UsageError
from fcmae.schema import CheckpointConfig
from fcmae.train import checkpoint
from fcmae.train.log import MetricsFile
from fcmae.train.rows import read_rows
from fcmae.weights import check_archive, load_tensors, read_weights
from small_runs import assert_same


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(3, 5, generator=generator) for name in ("b.weight", "a.weight", "ä")}
    return found | {"half": found["ä"].bfloat16(), "count": torch.tensor(7), "none": torch.zeros(0, 2)}


def test_a_changed_number_is_noticed(tmp_path):
    path, data = tmp_path / "x.safetensors", tensors()
    write_safetensors(path, data)
    found = load_tensors(path)
    assert found.keys() == data.keys()
    for name in data:
        assert_same(found[name], data[name], name)
    assert load_file(path).keys() == data.keys()  # others read it too
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", KEY: checksum(data)}
    whole = path.read_bytes()
    for place in (-1, -40, whole.index(b"a.weight"), whole.index(b"sha256:") + 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 or len(whole) :])
        with pytest.raises(UsageError, match="x.safetensors is damaged: the checksum of its tensors does not match"):
            load_tensors(path)
    path.write_bytes(whole.replace(b"fcmae.tensors", b"fcmae.tensorz")[:-1] + b"\1")
    with pytest.raises(UsageError, match="checksum"):
        read_safetensors(path)


def test_equal_tensors_make_equal_files_and_others_files_load(tmp_path):
    for i in range(8):  # safetensors itself writes its metadata in random order
        write_safetensors(tmp_path / f"{i}.safetensors", tensors())
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    save_file(tensors(), tmp_path / "foreign.safetensors", metadata={"format": "pt", "hash": f"sha256:{64 * 'a'}"})
    assert load_tensors(tmp_path / "foreign.safetensors").keys() == tensors().keys()


def test_an_archive_that_claims_another_compression_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(100)}, path)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        name = archive.infolist()[0].filename.encode()
    entry = data.rindex(name) - 46  # of the central directory; its method is 10 bytes in
    for method in (8, 12, 14, 99):
        path.write_bytes(data[: entry + 10] + bytes([method]) + data[entry + 11 :])
        with pytest.raises(UsageError, match="x.pt is (damaged|not a whole checkpoint)") as caught:
            check_archive(path)
        assert "\n" not in str(caught.value)


def test_an_archive_that_claims_several_disks_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(100)}, path)
    data = path.read_bytes()
    at = data.rindex(b"PK\x06\x07") + 16  # the ZIP64 locator's number of disks
    path.write_bytes(data[:at] + b"\7" + data[at + 1 :])
    with pytest.raises(UsageError, match="x.pt is not a whole checkpoint"):
        read_weights(path)


def test_weights_of_a_run_whose_newest_checkpoint_is_damaged_say_so(tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    from fcmae import create_model

    state = create_model("fcmae_convnextv2_atto", depths=[1, 1, 1, 1], dims=[8, 8, 8, 8], decoder_dim=8).state_dict()
    for step in (1, 2):
        checkpoint.save(folder, {"step": step, "model": state}, CheckpointConfig(every=1, keep_last=2))
    newest = checkpoint.path_of(folder, 2)
    newest.write_bytes(newest.read_bytes()[:-9])
    assert read_weights(tmp_path / "run").state.keys() == state.keys()
    said = capsys.readouterr().out
    assert "step_000000002.pt" in said and "falling back" in said


def test_damaged_lines_are_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 8)]
    torn = '{"step": 8, "lo'
    path.write_text("".join(lines) + torn)
    MetricsFile(path, 6).close()
    assert path.read_text() == "".join(lines[:6]) and capsys.readouterr().out == ""  # a kill leaves such an end
    broken = [lines[0], lines[1].replace("step", "stfp"), "\0" * 20 + "\n", *lines[3:], torn]
    path.write_text("".join(broken))
    assert [row["step"] for row in read_rows(path, "loss")] == [1, 4, 5, 6, 7]
    MetricsFile(path, 6).close()
    assert path.read_text() == "".join([lines[0], *lines[3:6]])
    assert "has 2 damaged lines, left out: number 2" in capsys.readouterr().out
