"""init=: pretraining that starts from weights of any layout."""

import pytest
import torch

from fcmae.convert import convert, read_checkpoint
from fcmae.pretrain import main
from small_runs import CONFIG, assert_same, make_pictures, metrics, run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    make_pictures(folder / "pictures", 24)
    (folder / "config.yaml").write_text(
        CONFIG.replace("steps: 60", "steps: 4").replace("warmup_epochs: 1", "warmup_epochs: 0")
    )
    assert start(folder, folder / "first") == 0
    return folder


def start(place, out, *settings):
    return main([str(place / "config.yaml"), f"data.source={place}/pictures", f"out={out}", *settings])


def test_from_a_run_decoder_and_all(place, tmp_path, capsys):
    # With no learning rate the weights stay what they began as.
    assert start(place, tmp_path / "second", f"init={place}/first", "train.lr=0", "train.weight_decay=0") == 0
    assert f"encoder and decoder from {place}/first" in capsys.readouterr().out
    assert_same(read_checkpoint(tmp_path / "second"), read_checkpoint(place / "first"))


@pytest.mark.parametrize("to,name", [("timm", "x.safetensors"), ("hf", "x"), ("official", "x.pth"), ("dense", "x.pt")])
def test_from_an_encoder_of_any_layout(place, tmp_path, capsys, to, name):
    convert(place / "first", tmp_path / name, to)
    assert start(place, tmp_path / "run", f"init={tmp_path}/{name}", "train.lr=0", "train.weight_decay=0") == 0
    assert "the decoder starts anew, there is none" in capsys.readouterr().out
    one, two = read_checkpoint(tmp_path / "run"), read_checkpoint(place / "first")
    for key in two:
        assert torch.equal(one[key], two[key]) == key.startswith("encoder.") or not two[key].any(), key


@pytest.mark.slow
def test_every_rank_starts_from_them(place, tmp_path):
    settings = ["train.lr=0", "train.weight_decay=0", "train.batch_size=4", "train.steps=2"]
    arguments = [f"data.source={place}/pictures", f"out={tmp_path}/two", f"init={place}/first", *settings]
    run(place / "config.yaml", *arguments, processes=2)
    assert_same(read_checkpoint(tmp_path / "two"), read_checkpoint(place / "first"))


@pytest.mark.slow
def test_every_rank_starts_from_their_buffers(place, tmp_path):
    """Trained positions and principal components are no parameters, which DDP would send."""
    sizes = ["dim=32", "depth=1", "heads=2", "decoder_dim=32", "decoder_depth=1", "decoder_heads=2"]
    vit = ["model.name=mae_vit_tiny_patch16", "model.depths=null", "model.dims=null", "mask.unit=32", "loss.pca=4"]
    vit += [f"model.{size}" for size in sizes]
    assert start(place, tmp_path / "one", *vit) == 0
    path = tmp_path / "trained.pt"
    weights = read_checkpoint(tmp_path / "one")
    weights["pos_embed"] = torch.randn_like(weights["pos_embed"])
    weights["target.mean"] += 1
    torch.save(weights, path)
    settings = [f"data.source={place}/pictures", f"init={path}", *vit, "train.steps=2"]
    run(place / "config.yaml", *settings, f"out={tmp_path}/alone")
    run(place / "config.yaml", *settings, f"out={tmp_path}/two", "train.batch_size=4", processes=2)
    for a, b in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert torch.equal(read_checkpoint(tmp_path / "two")["target.mean"], weights["target.mean"])


def test_resuming_does_not_start_over(place, tmp_path):
    settings = [f"init={place}/first", "checkpoint.every=2"]
    assert start(place, tmp_path / "whole", *settings) == 0
    assert start(place, tmp_path / "cut", *settings) == 0
    (tmp_path / "cut" / "checkpoints" / "step_000000004.pt").unlink()
    (tmp_path / "cut" / "encoder.safetensors").unlink()
    assert start(place, tmp_path / "cut", *settings) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert_same(read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "cut"))


def test_what_does_not_fit(place, tmp_path, capsys):
    for settings, words in [
        (["model.dims=[8,12,16,32]"], "set model.name"),
        (["model.in_chans=1"], "--in-chans 1"),
        ([f"resume={place}/first/checkpoints/step_000000004.pt"], "init"),
        (["init=nowhere.pth"], "no such file"),
    ]:
        arguments = [f"init={place}/first", *settings]
        assert start(place, tmp_path / "run", *arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()
    assert start(place, tmp_path / "run", f"init={place}/first", "model.decoder_dim=8", "train.lr=0") == 0
    assert "the decoder starts anew, there it is another" in capsys.readouterr().out
