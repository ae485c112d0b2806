"""What fcmae.analyze looks into: runs, checkpoints, files of every layout, fine-tuned folders, models of timm."""

import pytest
import timm
import torch

import labelled_runs
from fcmae import config as settings
from fcmae import finetune
from fcmae.analysis.subjects import open_subject
from fcmae.analyze import main
from fcmae.convert import convert, read_checkpoint
from fcmae.pretrain import build_model
from fcmae.schema import Config
from fcmae.train import family
from fcmae.weights import CHECKPOINT
from helpers import close, shake
from small_subjects import CONFIGS, analysed, make_images, make_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_images(tmp_path_factory.mktemp("subjects"))
    make_run(folder / "convnext", "convnext", folder / "all")
    make_run(folder / "vit", "vit", folder / "all")
    return folder


def test_weights_of_any_layout_are_the_same_network(place, tmp_path):
    """A run, its checkpoint, timm's layout of it, and random weights that the run began with."""
    convert(place / "convnext", tmp_path / "timm.safetensors", "timm")
    checkpoint = place / "convnext" / "checkpoints" / "step_000000001.pt"
    given = (place / "convnext", checkpoint, tmp_path / "timm.safetensors", f"{place / 'convnext'}@random")
    more = ("--images", place / "all", "--image-size", 64, "--count", 4)
    found = analysed(tmp_path / "out", "cosine-distance", *given, *more)
    run, *others, random = (value["mean"] for value in found["results"].values())
    assert others == pytest.approx([run, run], rel=1e-6) and abs(random - run) > 1e-3
    assert found["subjects"]["convnext, random"]["what"] == "fcmae_convnextv2_atto, random weights"
    assert found["subjects"]["timm.safetensors"]["image_size"] == [64, 64]
    assert "encoder.stem.0.weight" in read_checkpoint(tmp_path / "timm.safetensors")


def test_a_timm_model_by_name(place, tmp_path):
    given = ("timm:convnext_atto@random", "timm:vit_tiny_patch16_224@random", "--image-size", 64, "--images")
    found = analysed(tmp_path, "cosine-distance", *given, place / "all", "--count", 2)["results"]
    assert [len(value["layers"]) for value in found.values()] == [12, 12]


@pytest.mark.parametrize("layout,name", [("official", "vit.pth"), ("hf", "vit"), ("timm", "vit.safetensors")])
def test_vits_of_any_layout_are_the_same_network(tmp_path, monkeypatch, layout, name):
    """Of a published width, whose heads are known; the tokens of one whose are not would be somebody else's."""
    monkeypatch.setitem(CONFIGS, "tiny", CONFIGS["vit"].replace("dim: 32, depth: 3, heads: 2", "depth: 2"))
    images = make_images(tmp_path)
    run = make_run(tmp_path / "run", "tiny", images / "all")
    convert(run, tmp_path / name, layout, verify=False)
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        found = [open_subject(str(path), "it", (64, 64), CPU, 0).network.encode(x) for path in (run, tmp_path / name)]
    close(found[1], found[0], 1e-5)


def test_heads_that_no_tensor_tells_are_asked_for(place, tmp_path, capsys):
    for name, decoder in (("encoder", False), ("decoder", True)):
        convert(place / "vit", tmp_path / f"{name}.pth", "official", with_decoder=decoder, verify=False)
        given = [str(tmp_path / f"{name}.pth"), "--what", "filters", "--images", str(place / "one")]
        assert main([*given, "--out", str(tmp_path / "out")]) == 2
        assert "no tensor tells the attention heads" in capsys.readouterr().err


def test_a_fine_tuned_folder_tells_its_heads_size_and_normalization(tmp_path):
    folder = labelled_runs.make_place(tmp_path)
    torch.manual_seed(0)
    odd = {"dim": 48, "depth": 2, "heads": 4, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    config = settings.override(Config(), {"model": {"name": "mae_vit_tiny_patch16", "image_size": 32, **odd}}, "")
    family.fill(config)
    model = shake(build_model(config))
    torch.save(
        {"format": CHECKPOINT, "model": model.state_dict(), "config": settings.to_dict(config)}, tmp_path / "odd.pt"
    )
    given = labelled_runs.arguments(
        folder, tmp_path / "run", "train.steps=1", "train.warmup_epochs=0", "model.image_size=48",
        "data.mean=[0.3,0.4,0.5]", "model.pool=token", *labelled_runs.PLAIN, init="odd.pt",
    )  # fmt: skip
    assert finetune.main(given) == 0
    subject = open_subject(str(tmp_path / "run"), "run", None, CPU, 0)
    assert subject.network.heads == 4 and subject.image_size == (48, 48) and subject.mean == (0.3, 0.4, 0.5)
    timms = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=4, img_size=48, num_classes=4,
        checkpoint_path=str(tmp_path / "run" / "best.safetensors"),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        close(subject.network.encode(x), timms.forward_features(x), 1e-5)
    assert analysed(tmp_path / "out", "attention-distance", tmp_path / "run", "--images", folder / "shapes" / "val")
