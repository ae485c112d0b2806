"""Converting weights: what is proven before a file is written, what a kill leaves, and what is refused."""

import dataclasses
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from fcmae.convert import convert, main
from fcmae.layouts import LAYOUTS
from small_weights import authors_file, small_timm


@pytest.fixture
def authors(tmp_path):
    return authors_file(tmp_path)


def test_a_result_that_differs_is_not_written(authors, tmp_path, monkeypatch, capsys):
    wrong = dataclasses.replace(LAYOUTS["timm"], theirs=lambda key, x: x * 1.01 if key == "stem.0.weight" else x)
    monkeypatch.setitem(LAYOUTS, "timm", wrong)
    assert main([str(authors), str(tmp_path / "x.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "features differ from the source's by" in error and error.count("\n") == 1
    assert not (tmp_path / "x.safetensors").exists()
    assert main([str(authors), str(tmp_path / "x.safetensors"), "--no-verify"]) == 0
    assert "verified  no: --no-verify" in capsys.readouterr().out


@pytest.mark.parametrize("moment", [0, 1])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    "to,name", [("timm", "x.safetensors"), ("official", "x.pth"), ("hf", "x"), ("exported", "x.pt2")]
)
def test_interrupted_while_writing(authors, tmp_path, monkeypatch, to, name, exists, moment):
    """At each renaming, the last moments: DST is absent, or what it was."""
    dst, real, calls = tmp_path / name, os.replace, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == moment + 1:
            raise KeyboardInterrupt
        real(*paths)

    def content():
        files = sorted(dst.rglob("*")) if dst.is_dir() else [dst]
        return {p.name: p.read_bytes() for p in files} if dst.exists() else None

    if exists:
        convert(authors, dst, to, verify=False)
    elif moment:
        return  # there is one renaming
    before = content()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        try:
            convert(authors, dst, to, force=True, verify=False, in_chans=1)
        except KeyboardInterrupt:
            assert content() == before
        else:
            assert to != "hf" and moment == 1 and content() != before  # a file takes one renaming
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".x")]


def test_a_kill_between_two_renamings_is_mended(authors, tmp_path):
    convert(authors, tmp_path / "x", "hf", verify=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    (tmp_path / "x").rename(tmp_path / ".x.fcmae-old")
    with pytest.raises(ValueError, match="no such file"):
        convert(tmp_path / "nothing.pth", tmp_path / "x", "hf", force=True)
    with pytest.raises(ValueError, match="cannot hold|has no place"):
        convert(authors, tmp_path / "x", "hf", force=True, with_decoder=True)
    convert(authors, tmp_path / "x", "hf", verify=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()} == before
    assert not (tmp_path / ".x.fcmae-old").exists()


class Payload:
    def __reduce__(self):
        return (open, ("ran-code", "w"))


def test_refused_in_one_line(authors, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = authors.read_bytes()
    state = torch.load(authors, weights_only=False)["model"]
    (tmp_path / "cut.pth").write_bytes(good[:-2000])
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 16
    (tmp_path / "flipped.pth").write_bytes(flipped)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Payload()))
    torch.save({"model": Payload()}, tmp_path / "code.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    torch.save({f"stages.{i}.blocks.0.norm.bias": torch.zeros(2) for i in range(4)}, tmp_path / "near.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({key: x for key, x in state.items() if "stages.2.0.pwconv1" not in key}, tmp_path / "holes.pth")
    torch.save(state | {"encoder.stages.1.0.grn.gamma": torch.zeros(1, 7)}, tmp_path / "mixed.pth")
    torch.save(state | {"encoder.extra": torch.zeros(3)}, tmp_path / "extra.pth")
    save_file({key: x for key, x in state.items() if not key.startswith("encoder.stages.3")}, "part.safetensors")
    torch.save(state | {"encoder.stages.1.0.dwconv.kernel": torch.tensor(1.0)}, tmp_path / "rank.pth")
    torch.save(state | {"encoder.stages.0.9999999.norm.ln.bias": torch.zeros(8)}, tmp_path / "many.pth")
    torch.save({k: x for k, x in small_timm(5).state_dict().items() if "head.norm" not in k}, tmp_path / "bare.pth")
    (tmp_path / "text.pth").write_text("a: 1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert main(["checkpoint-799.pth", "exists.safetensors"]) == 0
    before = (tmp_path / "exists.safetensors").read_bytes()
    capsys.readouterr()
    for arguments, words in [
        ("none.pth new.safetensors", "no such file"),
        ("cut.pth new.safetensors", "cut.pth"),
        ("flipped.pth new.safetensors", "flipped.pth"),
        ("cut.safetensors new.safetensors", "not a whole"),
        ("empty.pth new.safetensors", "empty.pth"),
        ("photo.png new.safetensors", "photo.png"),
        ("pickle.pth new.safetensors", "could run code"),
        ("code.pth new.safetensors", "could run code"),
        ("foreign.pth new.safetensors", "unknown layout; its first keys are weight"),
        ("near.pth new.safetensors", "the nearest is timm, with 4 of 4 keys"),
        ("list.pth new.safetensors", "no state dict"),
        ("holes.pth new.safetensors", "2 missing: encoder.stages.2.blocks.0.mlp.fc1.bias"),
        ("mixed.pth new.safetensors", "encoder.stages.1.blocks.0.mlp.grn.weight is (7,) where (64,) belongs"),
        ("extra.pth new.safetensors", "1 unknown: encoder.extra"),
        ("part.safetensors new.safetensors", "no whole ConvNeXt V2"),
        ("rank.pth new.safetensors", "encoder.stages.1.0.dwconv.kernel of shape () does not belong"),
        ("many.pth new.safetensors", "not numbered 0, 1, 2"),
        ("bare.pth new.safetensors", "classifier without the norm"),
        ("text.pth new.safetensors", "text.pth"),
        ("folder new.safetensors", "name a file"),
        ("run new.safetensors", "without a checkpoint yet"),
        ("checkpoint-799.pth exists.safetensors", "--force"),
        ("checkpoint-799.pth folder --to hf", "--force"),
        ("checkpoint-799.pth folder/x.bin", "*.safetensors or *.pt"),
        ("checkpoint-799.pth nowhere/x.pth", "nowhere is no folder"),
        ("checkpoint-799.pth x.pth --to onnx", "*.onnx"),
        ("checkpoint-799.pth x.pth --to hf", "writes a folder"),
        ("checkpoint-799.pth x.pth --with-decoder", "timm has no place for a decoder"),
        ("exists.safetensors x.pth --to official --with-decoder", "source has no decoder"),
        ("checkpoint-799.pth x.pth --in-chans 0", "1 or more"),
        ("checkpoint-799.pth x.pt2 --to exported --image-size 100", "multiple"),
        ("checkpoint-799.pth folder --to timm --force", "*.safetensors"),
        ("checkpoint-799.pth run --to hf --force", "--force does not replace it"),
        ("checkpoint-799.pth .. --to hf --force", "--force does not replace it"),
        ("checkpoint-799.pth / --to hf --force", "is no name"),
    ]:
        assert main(arguments.split()) == 2, arguments
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "\x1b" not in error, error
    assert (tmp_path / "exists.safetensors").read_bytes() == before
    assert (
        not list(tmp_path.glob("new*"))
        and not (tmp_path / "ran-code").exists()
        and not list((tmp_path / "folder").iterdir())
    )
    for wrong in (["good.pth"], ["checkpoint-799.pth", "x.pth", "--to", "tensorflow"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
