"""A comparison's parts by themselves: FLOPs, kNN, probe, distances, the split, bad input, the shipped configs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fcmae import config as settings
from fcmae.compare import main
from fcmae.comparison import measure
from fcmae.comparison.memory import peak_memory
from fcmae.comparison.settings import CompareConfig, arms_of
from fcmae.downstream import representation
from fcmae.downstream.labelled import CentreCrops, open_labelled
from fcmae.schema import Config
from fcmae.train.schedule import make_schedule
from small_comparison import arguments, configured, make_place

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("compare"))


def test_averages_thinning_and_a_loss_that_is_not_reached():
    curve = {"step": list(range(1, 501)), "loss": [500.0 - i for i in range(500)]}
    curve |= {"seconds": [i / 2 for i in curve["step"]], "smooth": measure.running_mean(curve["loss"], 10)}
    assert measure.window(500) == 10 and measure.window(3) == 1
    assert curve["smooth"][0] == 500 and curve["smooth"][-1] == pytest.approx(5.5)
    assert curve["smooth"][99] == pytest.approx(np.mean(curve["loss"][90:100]))
    assert measure.time_to(curve, 5.5) == {"step": 500, "seconds": 250.0}
    assert measure.time_to(curve, 5.4) is None
    thin = measure.thinned(curve, most=100)
    assert len(thin["step"]) == 100 and thin["step"][-1] == 500 and set(np.diff(thin["step"])) == {5}
    assert thin["loss"] == [curve["loss"][s - 1] for s in thin["step"]]


def test_flops_by_hand(place):
    """The ConvNet's on visible regions are the dense network's times their share; the ViT's are summed here."""
    arms = arms_of(configured(place, "mask.ratio=0.5"))
    counted = {name: measure.flops(arm) for name, arm in arms.items()}
    assert counted["convnext"]["encoder"] * 6 == counted["convnext"]["encoder_dense"] * 3

    def block(tokens, dim):
        return 2 * tokens * dim * (3 + 1 + 8) * dim + 2 * 2 * tokens**2 * dim  # qkv, output, MLP; q k^T and its use

    visible, every = 3 * 4, 6 * 4
    encoder = 2 * visible * 768 * 32 + 3 * block(1 + visible, 32)
    decoder = 2 * (1 + visible) * 32 * 32 + block(1 + every, 32) + 2 * every * 32 * 768
    assert counted["vit"] == {
        "encoder": encoder,
        "whole": encoder + decoder,
        "encoder_dense": 2 * every * 768 * 32 + 3 * block(1 + every, 32),
    }


def test_flops_of_a_norm_over_the_batch(place):
    """One image with one visible region has a single position at the last stage, and no variance there."""
    arm = arms_of(configured(place, "arms.convnext.model.norm=bn", "mask.ratio=0.8"))["convnext"]
    found = measure.flops(arm)
    arm.model.norm = "ln"
    assert found == measure.flops(arm)


def test_knn_against_a_direct_computation():
    rng = np.random.default_rng(0)
    train, val, labels = rng.normal(size=(60, 5)), rng.normal(size=(30, 5)), rng.integers(0, 4, 60)
    expected = []
    for x in val:
        cosines = [float(x @ t / math.sqrt(x @ x) / math.sqrt(t @ t)) for t in train]
        votes = [0.0] * 4
        for i in sorted(range(60), key=lambda i: -cosines[i])[:7]:  # noqa: B023
            votes[labels[i]] += math.exp(cosines[i] / 0.07)
        expected.append(votes.index(max(votes)))
    tensors = [torch.from_numpy(x) for x in (train, labels, val)]
    assert representation.knn(*tensors, 4, [7], 0.07)[7].tolist() == expected
    assert len(set(expected)) == 4
    assert representation.knn(*tensors, 4, [600], 0.07)[600].shape == (30,)  # no more neighbours than images


def test_the_probe_is_the_minimum_and_the_same_every_time():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 6, generator=generator)
    labels = torch.arange(90) % 3
    train = centres[labels] + 0.3 * torch.randn(90, 6, generator=generator)
    val = centres[labels] + 0.3 * torch.randn(90, 6, generator=generator)
    scaled = train * torch.tensor([1e3, 1, 1e-3, 1, 1, 1]) + 7  # features are standardized
    found = representation.probe(train, labels, val, 3, 1e-3)
    assert (found == labels).double().mean() > 0.95
    assert torch.equal(found, representation.probe(train, labels, val, 3, 1e-3))
    moved = val * torch.tensor([1e3, 1, 1e-3, 1, 1, 1]) + 7
    assert torch.equal(found, representation.probe(scaled, labels, moved, 3, 1e-3))
    shuffled = labels[torch.randperm(90, generator=generator)]
    assert (representation.probe(train, shuffled, val, 3, 1e-3) == labels).double().mean() < 0.7
    for decay in (1e-3, 1e-1):
        fitted = representation.logistic_regression(train.double(), shuffled, 3, decay)
        weight, bias = (x.requires_grad_() for x in fitted)
        loss = torch.nn.functional.cross_entropy(train.double() @ weight + bias, shuffled)
        gradients = torch.autograd.grad(loss + decay / 2 * weight.square().sum(), (weight, bias))
        assert max(g.abs().max() for g in gradients) < 1e-5 and weight.abs().max() > 1e-3


def test_accuracy_and_its_error():
    found = representation.accuracy(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 0, 1]))
    assert found == {"top1": 0.5, "standard_error": 0.25, "balanced": pytest.approx((2 / 3 + 0) / 2)}


def test_the_split_of_labelled_images(place, tmp_path):
    root = str(place / "pictures")
    found = open_labelled(root, 3, 0, 0.2, 50_000)
    assert found.classes == ["photo0", "photo1", "photo2", "photo3"]
    assert [label for _, label in found.val] == [0, 0, 1, 1, 2, 2, 3, 3]
    train, val = {p for p, _ in found.train}, {p for p, _ in found.val}
    assert len(train) == 32 and not train & val
    assert open_labelled(root, 3, 0, 0.2, 50_000) == found != open_labelled(root, 3, 1, 0.2, 50_000)
    assert len(open_labelled(root, 3, 0, 0.2, 5).train) == 5
    for part, source in (("train", "photo0"), ("train", "photo1"), ("val", "photo1")):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / source).symlink_to(place / "pictures" / source)
    split = open_labelled(str(tmp_path), 3, 0, 0.2, 50_000)
    assert (len(split.train), len(split.val), split.classes) == (20, 10, ["photo0", "photo1"])
    assert {label for _, label in split.val} == {1}


def test_a_centre_crop_is_the_centre(tmp_path):
    """A gradient across: the crop of the middle 7/8 has the ends of the middle 7/8."""
    crops = CentreCrops([], (64, 64), 3, [0.0] * 3, [1.0] * 3)
    ramp = torch.linspace(0, 1, 256).expand(3, 128, 256)
    crop = crops.crop(ramp)
    assert crop.shape == (3, 64, 64)
    width = 64 / (256 * 64 / 128 * 256 / 224)  # of the scaled image
    assert crop[0, :, 0].mean() == pytest.approx(0.5 - width / 2, abs=0.01)
    assert crop[0, :, -1].mean() == pytest.approx(0.5 + width / 2, abs=0.01)


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["arms={convnext: {train: {lr: 1e-3}}}"], None),  # merged into the two that there are
        (["budget.steps=null"], ["no budget", "budget.steps and budget.seconds"]),
        (["budget.seconds=5"], ["both budget.steps=12 and budget.seconds=5"]),
        (["budget.steps=0"], ["budget.steps=0", "1 or more"]),
        (["arms.vit.modle.name=x"], ["arms.vit.modle.name=x", "unknown setting", "model.name"]),
        (["arms.vit=3"], ["arms.vit takes settings"]),
        (["arms.vit.train.lr=fast"], ["arms.vit", "train.lr takes float"]),
        (["arms.vit.data.source=elsewhere"], ["arms.vit.data.source", "the same for all arms"]),
        (["arms.vit.mask.ratio=0.5"], ["arms.vit.mask.ratio", "the same for all arms"]),
        (["arms.vit.loss.norm_window=16"], ["arms.vit.loss.norm_window", "the same for all arms"]),
        (["arms.vit.seed=1"], ["arms.vit.seed", "the same for all arms"]),
        (["arms.vit.model.image_size=32"], ["arms.vit.model.image_size", "the same for all arms"]),
        (["arms.vit.train.steps=5"], ["arms.vit.train.steps", "the budget says how long"]),
        (["train.steps=5"], ["train.steps=5", "the budget says how long"]),
        (["arms.vit.out=x"], ["arms.vit.out", "out/arms/NAME"]),
        (["arms.vit.train.batch_size=4"], ["train.effective_batch", "8 of convnext, 4 of vit"]),
        (["mask.ratio=null"], ["mask.ratio", "0.6 of convnext, 0.75 of vit"]),
        (["loss.norm_window=null"], ["loss.norm_window", "32 of convnext, 16 of vit"]),
        (["mask.unit=16"], ["arm convnext", "mask.unit=16"]),
        (["arms.vit.model.heads=5"], ["arm vit", "heads=5"]),
        (["arms.vit.model.name=mae_vit_tinny"], ["arm vit", "unknown model", "mae_vit_tiny_patch16"]),
        (["arms.vit.init=nowhere.pt"], ["arm vit", "nowhere.pt"]),
        (["arms.a/b.seed=1"], ["arms.a/b", "folder"]),
        (["data.source=nowhere"], ["data.source=nowhere", "does not exist"]),
        (["data.labelled=nowhere"], ["data.labelled=nowhere", "no folder"]),
        (["data.labelled={place}/pictures/photo0"], ["data.labelled=", "no folder with images in it"]),
        (["data.labelled={place}/one"], ["data.labelled=", "only the class photo0"]),
        (["evaluate.neighbours=0"], ["evaluate.neighbours=0", "1 or more"]),
        (["train.warmup_epochs=9"], ["arm convnext", "train.warmup_epochs=9"]),
        (["out=null"], ["out=null", "folder of the comparison"]),
        (["arms.masked.model.name=mae_vit_tiny_patch16"], ["arms.masked", "choose another name"]),
        (["evaluate.temperature=.inf"], ["evaluate.temperature=inf", "finite"]),
        (["time_to_loss=.nan"], ["time_to_loss=nan", "finite"]),
        (["data.labelled={place}/pairs", "evaluate.val_share=0.6"], ["no image to train on", "lower"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(place, tmp_path, capsys, overrides, words):
    if not (place / "one").exists():
        (place / "one").mkdir()
        (place / "one" / "photo0").symlink_to(place / "pictures" / "photo0")
        for name in ("photo0", "photo1"):
            (place / "pairs" / name).mkdir(parents=True)
            picture = next((place / "pictures" / name).iterdir())
            (place / "pairs" / name / "only.png").write_bytes(picture.read_bytes())
    if words is None:
        assert arms_of(configured(place, *overrides))["convnext"].train.lr == 1e-3
        return
    overrides = [o.replace("{place}", str(place)) for o in overrides]
    assert main(arguments(place, tmp_path / "out", *overrides)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


def test_what_would_stop_the_second_arm_is_found_before_the_first(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "no compiler"))
    assert main(arguments(place, tmp_path / "out", "arms.vit.train.compile=true")) == 2
    assert "arm vit: train.compile" in capsys.readouterr().err
    broken = tmp_path / "out" / "arms" / "vit" / "checkpoints"
    broken.mkdir(parents=True)
    (broken / "step_000000004.pt").write_bytes(b"half a checkpoint")
    arm = arms_of(configured(place, f"out={tmp_path / 'out'}"))["vit"]
    arm.train.accum_steps, arm.train.effective_batch = 1, 8
    settings.write_yaml(arm, broken.parent / "config.yaml")
    settings.write_yaml(configured(place, f"out={tmp_path / 'out'}"), tmp_path / "out" / "config.yaml")
    assert main(arguments(place, tmp_path / "out")) == 2
    assert "arm vit: none of the 1 checkpoints" in capsys.readouterr().err
    assert not (tmp_path / "out" / "arms" / "convnext").exists()


def test_memory_that_cannot_be_measured_is_no_end(place, tmp_path):
    found = peak_memory(arms_of(configured(place))["vit"], tmp_path / "nowhere.yaml", torch.device("cpu"))
    assert found["bytes"] is None and found["what"].startswith("not measured, the process for it failed: ")


@pytest.mark.parametrize("arms", ["arms: {}", "arms: {vit: {model: {name: mae_vit_tiny_patch16}}}"])
def test_fewer_than_two_arms(place, tmp_path, capsys, arms):
    (tmp_path / "few.yaml").write_text(f"{arms}\nbudget: {{steps: 3}}\n")
    given = [str(tmp_path / "few.yaml"), f"data.source={place / 'pictures'}", f"out={tmp_path / 'out'}"]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "give two or more" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["laptop", "published_base", "published_large"])
def test_shipped_comparisons(name):
    path = CONFIGS / "compare" / f"{name}.yaml"
    config = settings.load(CompareConfig, path, ["data.source=x"])
    arms = arms_of(config)
    assert list(arms) == ["convnext", "vit"]
    assert all((a.mask.unit, a.mask.ratio, a.loss.norm_window) == (32, 0.6, 32) for a in arms.values())
    head = path.read_text().split("\n\n")[0]
    for word in ("Compares:", "Command:", "Cost:", "Expected:"):
        assert word in head
    if name == "laptop":
        return
    for arm in arms.values():
        schedule = make_schedule(arm.train, 1_281_167, world_size=8)
        recipe = settings.load(Config, CONFIGS / "pretrain" / f"{arm.model.name}.yaml", [])
        own = make_schedule(recipe.train, 1_281_167, world_size=8)
        assert (schedule.steps, schedule.effective_batch, schedule.peak_lr) == (
            own.steps, own.effective_batch, own.peak_lr,
        )  # fmt: skip
        assert (schedule.warmup_epochs, schedule.epochs) == (own.warmup_epochs, pytest.approx(own.epochs, rel=1e-5))
        same = ("batch_size", "weight_decay", "betas", "precision", "clip_grad")
        assert [getattr(arm.train, key) for key in same] == [getattr(recipe.train, key) for key in same]
        assert arm.model.image_size == recipe.model.image_size and arm.data.crop_scale == recipe.data.crop_scale
