"""Reading and converting weights: what is taken, what is refused, and that nothing runs or is overwritten."""

import argparse
import pickle

import pytest
import timm
import torch

from fcmae.convert import main, read_checkpoint
from fcmae.layouts import official
from helpers import close, golden, section


def save_official(path):
    """What the authors' pretraining script writes: the weights under `model`, its command line beside them."""
    tensors, _ = golden("fcmae_b1_128px")
    torch.save({"model": section(tensors, "checkpoint."), "args": argparse.Namespace(lr=1.5e-4, mask_ratio=0.6)}, path)
    return tensors


def test_the_authors_file_becomes_a_timm_model(tmp_path, capsys):
    tensors = save_official(tmp_path / "checkpoint-799.pth")
    assert main([str(tmp_path / "checkpoint-799.pth"), str(tmp_path / "encoder.safetensors"), "--to", "timm"]) == 0
    assert "encoder.safetensors" in capsys.readouterr().out
    dense = timm.models.convnext.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), use_grn=True, ls_init_value=None)
    dense.reset_classifier(0)
    timm.models.load_checkpoint(dense, str(tmp_path / "encoder.safetensors"), strict=True)
    with torch.no_grad():
        close(dense.eval()(tensors["image"]), tensors["dense_features"], 1e-5)


def test_our_names_and_values(tmp_path):
    tensors = save_official(tmp_path / "a.pth")
    state = read_checkpoint(tmp_path / "a.pth")
    dense = section(tensors, "dense.")  # the authors' own densification
    assert torch.equal(state["encoder.stages.2.blocks.1.conv_dw.weight"], dense["stages.2.1.dwconv.weight"])
    assert torch.equal(state["encoder.stages.3.downsample.1.weight"], dense["downsample_layers.3.1.weight"])
    assert torch.equal(state["encoder.stages.0.blocks.0.mlp.grn.weight"], dense["stages.0.0.grn.gamma"].flatten())
    assert not official.recognises(state) and len(state) == len(section(tensors, "checkpoint."))


class Payload:
    def __reduce__(self):
        return (open, ("ran-code", "w"))


def test_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_official(tmp_path / "good.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:-2000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Payload()))
    torch.save({"model": Payload()}, tmp_path / "code.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    assert main(["good.pth", "exists.safetensors"]) == 0
    before = (tmp_path / "exists.safetensors").read_bytes()
    capsys.readouterr()
    for source, words in [
        ("none.pth", "no such file"),
        ("cut.pth", "cut.pth"),
        ("cut.safetensors", "not a whole"),
        ("pickle.pth", "could run code"),
        ("code.pth", "could run code"),
        ("foreign.pth", "unknown layout; its first keys are weight"),
        ("list.pth", "no state dict"),
        ("exists.safetensors", "timm's layout"),
    ]:
        assert main([source, "new.safetensors"]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and "\x1b" not in error, error
    assert main(["good.pth", "exists.safetensors"]) == 2 and "--force" in capsys.readouterr().err
    assert (tmp_path / "exists.safetensors").read_bytes() == before
    assert not (tmp_path / "new.safetensors").exists() and not (tmp_path / "ran-code").exists()
    with pytest.raises(SystemExit) as caught:
        main(["good.pth"])
    assert caught.value.code == 2
