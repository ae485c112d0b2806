"""Fine-tuning: what it trains and leaves, that timm takes it, and that every way to the same batch gives the same."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from ending import ended
from fcmae.downstream.data import open_parts
from fcmae.downstream.labelled import CentreCrops
from fcmae.finetune import main
from fcmae.models import create_model
from fcmae.pretrain import main as pretrain
from labelled_runs import (
    PLAIN,
    arguments,
    assert_close_weights,
    assert_same_outcome,
    make_place,
    results,
    start,
    validations,
)
from small_runs import final_state, metrics, printed_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def whole(place):
    """A run with everything on."""
    assert main(arguments(place, place / "whole")) == 0
    return place / "whole"


def test_a_run_learns(place, tmp_path, capsys):
    """Shapes are told apart far better than by chance, by the weights it calls best."""
    more = ("train.steps=240", "train.lr=1e-2", "eval.every=5", "ema.enabled=false", "train.layer_decay=null")
    more += ("data.crop_scale=[0.7,1]", "train.label_smoothing=0", "data.flip=0", "log.print_every=1000")
    assert main(arguments(place, tmp_path / "run", *PLAIN, *more)) == 0
    rows = metrics(tmp_path / "run")
    assert sum(r["loss"] for r in rows[-10:]) < 0.7 * sum(r["loss"] for r in rows[:10])
    found = results(tmp_path / "run")
    assert found["best"]["top1"] >= 0.6 and found["ema"] is None
    assert found["best"]["top1"] == max(r["model"]["top1"] for r in validations(tmp_path / "run"))
    assert "--table" in capsys.readouterr().out


def test_what_a_run_leaves(place, whole):
    for name in ("curve.png", "confusion.png"):
        assert (whole / name).read_bytes()[:4] == b"\x89PNG"
    assert (whole / "classes.txt").read_text().split() == ["bars", "disc", "frame", "wedge"]
    assert json.loads((whole / "per_class.json").read_text())["classes"]["wedge"]["images"] == 3
    rows, found = validations(whole), results(whole)
    assert [r["step"] for r in rows] == [6, 12, 18, 20]  # 46 images, 8 a step: every epoch, and the end
    assert found["last"] == rows[-1]["model"] and found["ema"] == rows[-1]["ema"]
    tops = [(r[of]["top1"], r["step"], of) for r in rows for of in ("model", "ema")]
    assert found["best"]["top1"] == max(t for t, _, _ in tops)
    assert (found["best"]["top1"], found["best"]["step"], found["best"]["of"]) in tops
    last, ema = load_file(whole / "last.safetensors"), load_file(whole / "ema.safetensors")
    state = final_state(whole)
    assert all(torch.equal(last[k], state["model"][k]) and torch.equal(ema[k], state["ema"][k]) for k in last)
    assert not torch.equal(last["head.fc.weight"], ema["head.fc.weight"])


def test_the_average_is_the_average(place, tmp_path):
    """The EMA of three steps, computed from the checkpoints of each."""
    more = ("train.steps=3", "train.warmup_epochs=0", "checkpoint.every=1", "checkpoint.keep_last=3", "ema.decay=0.75")
    assert main(arguments(place, tmp_path / "run", *PLAIN, *more)) == 0
    states = [torch.load(p, weights_only=True) for p in sorted((tmp_path / "run" / "checkpoints").glob("*.pt"))]
    for name in ("stem.0.weight", "stages.2.blocks.1.mlp.grn.weight", "head.norm.bias"):
        for before, after in zip(states, states[1:], strict=False):
            wanted = 0.75 * before["ema"][name] + 0.25 * after["model"][name]
            torch.testing.assert_close(after["ema"][name], wanted)


VIT = "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    "name,pool", [("convnextv2_atto", "avg"), (VIT, "avg"), pytest.param(VIT, "token", marks=pytest.mark.slow)]
)
def test_timm_gives_the_same_accuracy(place, tmp_path, name, pool, capsys):
    out = tmp_path / "run"
    more = ("train.steps=8", "train.warmup_epochs=0", f"model.name={name}", f"model.pool={pool}", "eval.every=100")
    assert main(arguments(place, out, *more, init=None)) == 0
    assert type(printed_model(capsys.readouterr().out)) is type(timm.create_model(name))
    about = json.loads((out / "last.json").read_text())
    model = timm.create_model(about["model"], checkpoint_path=str(out / "last.safetensors"), **about["timm"]).eval()
    parts = open_parts(f"{place}/shapes/train", f"{place}/shapes/val", 3, 1.0, 0)
    assert about["classes"] == parts.classes and about["model"] == name
    images, labels = zip(
        *CentreCrops(parts.val, tuple(about["image_size"]), 3, about["mean"], about["std"]), strict=True
    )
    with torch.no_grad():
        logits = model(torch.stack(images))
    found = results(out)["last"]
    assert (logits.argmax(1) == torch.tensor(labels)).double().mean().item() == pytest.approx(found["top1"])
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(labels)).item()
    assert loss == pytest.approx(found["loss"], rel=1e-5) and about["val"]["top1"] == found["top1"]


def test_workers_change_nothing(place, whole, tmp_path):
    """RandAugment, erasing, mixing and drop path follow from seed, epoch, image and step."""
    assert main(arguments(place, tmp_path / "workers", "data.workers=2")) == 0
    assert_same_outcome(tmp_path / "workers", whole)


def test_another_seed_changes_everything(place, whole, tmp_path):
    assert main(arguments(place, tmp_path / "seed", "seed=1", "train.steps=2", "train.warmup_epochs=0")) == 0
    assert metrics(tmp_path / "seed")[0]["loss"] != metrics(whole)[0]["loss"]


@pytest.fixture(scope="module")
def single(place):
    assert main(arguments(place, place / "single", *PLAIN)) == 0
    return place / "single"


@pytest.mark.slow
def test_two_ranks_follow_one_process(place, single, tmp_path):
    process = start("fcmae.finetune", arguments(place, tmp_path / "two", *PLAIN, "train.batch_size=4"), processes=2)
    said, errors = ended(process)
    assert process.returncode == 0, errors[-2000:]
    assert "8 = 4 x 1 accumulated x 2 processes" in said
    assert_close_weights(tmp_path / "two", single, 1e-5)
    ours, theirs = validations(tmp_path / "two"), validations(single)
    for a, b in zip(ours, theirs, strict=True):
        assert a["model"]["images"] == b["model"]["images"] == 18  # every image once
        assert a["model"]["loss"] == pytest.approx(b["model"]["loss"], rel=1e-4)


def test_accumulation_follows_the_whole_batch(place, single, tmp_path):
    assert main(arguments(place, tmp_path / "a", *PLAIN, "train.batch_size=2", "train.effective_batch=8")) == 0
    assert_close_weights(tmp_path / "a", single, 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.slow
def test_low_precision_follows_fp32(place, single, tmp_path, precision):
    assert main(arguments(place, tmp_path / "low", *PLAIN, f"train.precision={precision}")) == 0
    for ours, theirs in zip(metrics(tmp_path / "low"), metrics(single), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)


@pytest.mark.slow
def test_compiled_follows_eager(place, single, tmp_path):
    assert main(arguments(place, tmp_path / "c", *PLAIN, "train.compile=true")) == 0
    losses = [r["loss"] for r in metrics(tmp_path / "c")]
    assert losses == pytest.approx([r["loss"] for r in metrics(single)], rel=1e-3)


def test_eval_repeats_a_run_s_best(place, whole, tmp_path, capsys):
    assert main(arguments(place, tmp_path / "e", "--eval", init="whole")) == 0
    said = json.loads(capsys.readouterr().out)
    best, seen = results(whole)["best"], {"image_size": [32, 32], "crop_pct": 0.875, "crop_mode": "center"}
    assert said == {key: best[key] for key in said if key in best} | seen
    assert set(said) > {"top1", "top5", "balanced", "loss"}
    assert json.loads((tmp_path / "e" / "eval.json").read_text())["top1"] == best["top1"]
    classes = json.loads((tmp_path / "e" / "eval_per_class.json").read_text())["classes"]
    assert classes == json.loads((whole / "per_class.json").read_text())["classes"]
    assert (tmp_path / "e" / "eval_confusion.png").read_bytes()[:4] == b"\x89PNG"
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    assert main([str(place / "config.yaml"), f"init={whole / 'best.safetensors'}", "--eval"]) == 0
    assert json.loads(capsys.readouterr().out) == said
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "v1"])
def test_what_no_tensor_tells_stays_with_the_file(place, tmp_path, kind, capsys):
    """A ViT with heads that are not its width's, of oblong images; and ConvNeXt V1's blocks."""
    if kind == "heads":
        size = {"image_size": (32, 128), "heads": 6}
        encoder = create_model("mae_vit_tiny_patch16", **size, decoder_dim=32, decoder_depth=1, decoder_heads=2)
        more = ["model.image_size=[32,128]"]
    else:
        encoder, more = create_model("fcmae_convnextv2_atto", decoder_dim=16, norm="none"), []
    torch.save({"model": encoder.state_dict()}, tmp_path / "encoder.pt")
    if kind == "heads":  # a run's checkpoint tells its heads; weights alone do not
        init = tmp_path / "pretrain"
        config = tmp_path / "pretrain.yaml"
        config.write_text(
            "model: {name: mae_vit_tiny_patch16, image_size: [32, 128], heads: 6, decoder_dim: 32, decoder_depth: 1, "
            "decoder_heads: 2}\ntrain: {steps: 1, batch_size: 2, warmup_epochs: 0}\n"
            f"data: {{source: {place}/shapes/train, workers: 0}}\nlog: {{tensorboard: false, images: 0}}\ndevice: cpu"
        )
        assert pretrain([str(config), f"out={init}"]) == 0
    else:
        init = tmp_path / "encoder.pt"
    run, short = tmp_path / "run", ["train.steps=2", "train.warmup_epochs=0", "train.batch_size=4"]
    assert main([*arguments(place, run, *more, *short, init=None), f"init={init}"]) == 0
    about = json.loads((run / "last.json").read_text())
    arguments_of = about["timm"]
    assert arguments_of.get("num_heads", 6) == 6 and arguments_of.get("use_grn", False) is False
    model = timm.create_model(about["model"], checkpoint_path=str(run / "last.safetensors"), **arguments_of).eval()
    capsys.readouterr()
    assert (
        main([str(place / "config.yaml"), "--eval", f"init={run / 'last.safetensors'}", "model.image_size=null"]) == 0
    )
    said, parts = (
        json.loads(capsys.readouterr().out),
        open_parts(f"{place}/shapes/train", f"{place}/shapes/val", 3, 1.0, 0),
    )
    crops = CentreCrops(parts.val, tuple(about["image_size"]), 3, about["mean"], about["std"])
    images, labels = zip(*crops, strict=True)
    with torch.no_grad():
        logits = model(torch.stack(images))
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(labels)).item()
    assert said["image_size"] == about["image_size"]
    assert said["loss"] == pytest.approx(loss, rel=1e-5) == results(run)["last"]["loss"]
