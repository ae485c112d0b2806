"""Bad input of fine-tuning and probing: one line, status 2, nothing written. And the table of runs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from fcmae.finetune import main
from fcmae.probe import main as probe
from labelled_runs import arguments, make_place, results


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_place(tmp_path_factory.mktemp("errors"))
    assert main(arguments(folder, folder / "done", "train.steps=2", "train.warmup_epochs=0")) == 0
    shapes = folder / "shapes"
    shutil.copytree(shapes / "train", folder / "hollow")
    for image in (folder / "hollow" / "frame").iterdir():
        image.unlink()
    shutil.copytree(shapes / "val", folder / "more")
    shutil.copytree(shapes / "val" / "disc", folder / "more" / "zebra")
    shutil.copytree(shapes / "train", folder / "three")
    shutil.rmtree(folder / "three" / "bars")
    (folder / "one").mkdir()
    shutil.copytree(shapes / "train" / "disc", folder / "one" / "disc")
    (folder / "flat").mkdir()
    shutil.copy(shapes / "train" / "disc" / "000.png", folder / "flat")
    save_file({"a.weight": torch.zeros(2)}, folder / "strange.safetensors")
    return folder


CASES = [
    (["data.train={place}/hollow"], ["data.train=", "class folder frame holds no image"]),
    (["data.val={place}/more"], ["data.val=", "has the class zebra", "lacks"]),
    (["data.train={place}/one"], ["only the class disc"]),
    (["data.train={place}/flat"], ["holds no class folders"]),
    (["data.train={place}/nowhere"], ["data.train=", "does not exist"]),
    (["data.train=null"], ["data.train=null", "class folders to train on"]),
    (["data.val=null"], ["data.val=null", "class folders to validate on"]),
    (["data.val={place}/shapes/train"], ["are both"]),
    (["model.classes=7"], ["has 4 classes", "model.classes=7"]),
    (["data.fraction=0"], ["data.fraction=0.0", "more than 0"]),
    (["data.fraction=1.5"], ["data.fraction=1.5", "at most 1"]),
    (["data.fraction=0.01"], ["larger than the dataset of 4", "lower"]),
    (["model.name=convnextv2_base"], ["holds ConvNeXt V2 of depths", "model.name=convnextv2_base is another model"]),
    (["model.name=convnextv2_big"], ["unknown model.name=convnextv2_big", "did you mean"]),
    (["init={place}/strange.safetensors"], ["strange.safetensors", "unknown layout"]),
    (["init={place}/missing.pt"], ["no such file"]),
    (["init=null"], ["model.name=null", "set where init is not"]),
    (["init=null", "model.name=vit_tiny_patch16_224", "model.image_size=40"], ["40", "16"]),
    (["init={place}/vit.pt", "model.image_size=40"], ["40", "16"]),
    (["model.image_size=16"], ["model.image_size=16", "32 pixels"]),
    (["model.image_size=big"], ["model.image_size=big"]),
    (["model.in_chans=1", "data.randaugment=null"], ["is for 3 channels and model.in_chans=1"]),
    (["data.mixup=0.5", "train.batch_size=5"], ["train.batch_size=5", "even"]),
    (["data.randaugment=rand-m9-x"], ["data.randaugment=rand-m9-x", "rand-m9-mstd0.5-inc1"]),
    (["train.layer_decay=0"], ["train.layer_decay=0.0"]),
    (["train.layer_decay_scheme=stage"], ["train.layer_decay_scheme=stage", "block, group or null"]),
    (["init={place}/vit.pt", "train.layer_decay_scheme=group"], ["group is for ConvNets"]),
    (["train.optimizer=sgd"], ["train.optimizer=sgd", "adamw or lars"]),
    (["ema.decay=1"], ["ema.decay=1.0"]),
    (["train.epochs=nan"], ["train.epochs=nan", "finite"]),
    (["--eval", "init=null"], ["--eval needs a classifier"]),
    (["--eval"], ["has no classifier"]),
    (["--eval", "init={place}/done", "data.val={place}/more"], ["has the class zebra", "does not know"]),
    (["--eval", "init={place}/done/best.safetensors", "data.val=null"], ["data.val=null"]),
    (["resume={place}/missing.pt", "model.name=null"], ["missing.pt"]),
]


@pytest.mark.parametrize("overrides,words", CASES, ids=[" ".join(case[0])[:50] for case in CASES])
def test_one_line_and_nothing_written(place, tmp_path, capsys, overrides, words):
    given = [o.replace("{place}", str(place)) for o in overrides]
    assert main(arguments(place, tmp_path / "out", *given)) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.err.startswith("fcmae.finetune: error: ")
    for word in words:
        assert word in said.err, said.err
    assert not (tmp_path / "out").exists()


PROBES = [
    (["--mode", "partial", "probe.blocks=[0,6]"], ["6 blocks of the 5"]),
    (["--mode", "partial", "probe.blocks=[1.5]"], ["probe.blocks=[1.5]", "0.5"]),
    (["--mode", "partial", "probe.blocks=[1,1]"], ["each number once"]),
    (["--mode", "knn", "probe.neighbours=[0]"], ["probe.neighbours=[0]"]),
    (["--mode", "forest"], ["probe.mode=forest", "linear, partial, knn"]),
    (["--mode"], ["'probe.mode=' gives no value"]),
]


@pytest.mark.parametrize("overrides,words", PROBES, ids=[" ".join(case[0]) for case in PROBES])
def test_probes_refuse_too(place, tmp_path, capsys, overrides, words):
    assert probe(arguments(place, tmp_path / "out", *overrides)) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and all(word in said.err for word in words), said.err
    assert not (tmp_path / "out").exists()


def test_other_classes_are_noticed(place, tmp_path, capsys):
    """A fine-tuned file of four classes, validated on three of other names; and a run whose data lost a class."""
    plain = tmp_path / "plain.safetensors"  # without what fine-tuning writes beside it
    shutil.copy(place / "done" / "best.safetensors", plain)
    assert main(arguments(place, tmp_path / "out", "--eval", f"init={plain}", f"data.val={place}/three")) == 2
    assert "tells 4 classes and data.val=" in capsys.readouterr().err
    parts = [f"data.{part}={tmp_path / part}" for part in ("train", "val")]
    again = arguments(place, tmp_path / "run", "train.steps=2", "train.warmup_epochs=0", *parts)
    for part in ("train", "val"):
        shutil.copytree(place / "shapes" / part, tmp_path / part)
    assert main(again) == 0
    for part in ("train", "val"):
        (tmp_path / part / "bars").rename(tmp_path / part / "stripes")
    capsys.readouterr()
    assert main(again) == 2
    assert "holds a run with other classes" in capsys.readouterr().err


def test_a_classifier_stays_or_starts_anew(place, tmp_path, capsys):
    """The head of a fine-tuned file is kept for as many classes, as the 384 px stage needs, and replaced for others."""
    frozen = ("train.lr=0", "train.min_lr=0", "train.steps=1", "train.warmup_epochs=0", "ema.enabled=false")
    kept = arguments(place, tmp_path / "kept", *frozen, "model.drop_path=0", init="done")
    assert main(kept) == 0
    best = results(place / "done")["best"]
    assert results(tmp_path / "kept")["last"]["loss"] == pytest.approx(best["loss"], rel=1e-6)
    fresh = arguments(place, tmp_path / "fresh", *frozen, f"data.train={place}/three", init="done")
    val = tmp_path / "val"
    shutil.copytree(place / "shapes" / "val", val)
    shutil.rmtree(val / "bars")
    assert main([*fresh, f"data.val={val}"]) == 0
    assert results(tmp_path / "fresh")["last"]["loss"] == pytest.approx(1.0986, abs=0.02)  # a head of std 2e-5: ln 3


@pytest.mark.parametrize("size", [pytest.param("48", marks=pytest.mark.slow), "[32,64]"])
def test_a_vit_at_another_size(place, tmp_path, size):
    more = ("train.steps=2", "train.warmup_epochs=0", f"model.image_size={size}")
    assert main(arguments(place, tmp_path / "run", *more, init="vit.pt")) == 0
    about = json.loads((tmp_path / "run" / "best.json").read_text())
    assert about["timm"]["img_size"] == ([48, 48] if size == "48" else [32, 64])


def test_the_table_of_runs(place, tmp_path, capsys):
    more = ("train.steps=2", "train.warmup_epochs=0", "model.name=convnextv2_atto", "ema.enabled=false")
    assert main(arguments(place, tmp_path / "scratch", *more, init=None)) == 0
    weights = tmp_path / "scratch" / "last.safetensors"
    assert main([*arguments(place, tmp_path / "tuned", *more, init=None), f"init={weights}"]) == 0
    capsys.readouterr()
    assert main(["--table", str(tmp_path / "scratch"), str(tmp_path / "tuned")]) == 0
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("|")]
    a, b = (results(tmp_path / name)["last"]["top1"] for name in ("scratch", "tuned"))
    assert len(rows) == 4 and rows[2].endswith(
        f"| – | {100 * results(tmp_path / 'scratch')['last']['balanced']:.2f} | – |"
    )
    assert (
        rows[3].split("|")[5].strip() == f"{100 * b:.2f}" and rows[3].split("|")[-2].strip() == f"{100 * (b - a):+.2f}"
    )
    assert not (tmp_path / "table.md").exists()
    for runs, word in (([], "needs the folders"), ([place / "shapes"], "is no fine-tuned run")):
        assert main(["--table", *map(str, runs)]) == 2
        assert word in capsys.readouterr().err
    (tmp_path / "tuned" / "results.json").unlink()
    assert main(["--table", str(tmp_path / "tuned")]) == 2
    assert "is not finished" in capsys.readouterr().err
