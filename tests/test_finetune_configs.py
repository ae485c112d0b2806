"""The shipped recipes of fine-tuning and probing are what is published, and every one can be run."""

import re
from pathlib import Path

import pytest

from fcmae import config as settings
from fcmae.downstream import checks, groups
from fcmae.downstream.settings import BRANCH_KEYS, FREE_KEYS, FinetuneConfig, ProbeConfig
from fcmae.downstream.start import find_start
from fcmae.models import MODELS
from fcmae.train.schedule import make_schedule

CONFIGS = Path(__file__).parent.parent / "configs"
DATA = ["data.train=a", "data.val=b"]
# base_lr, epochs, warm-up, layer decay, its scheme, weight decay, drop path, mixup = cutmix or None where they differ,
# label smoothing, batch, EMA: ConvNeXt V2 as in tables 9 to 13 of arXiv 2301.00808 (base_lr of base and large as on the
# authors' training page), MAE as in its appendix.
PUBLISHED = {
    "convnextv2_atto": (2e-4, 600, 0, 0.9, "block", 0.3, 0.1, 0.0, 0.2, 1024, True),
    "convnextv2_femto": (2e-4, 600, 0, 0.9, "block", 0.05, 0.0, 0.3, 0.2, 1024, True),
    "convnextv2_pico": (2e-4, 600, 0, 0.9, "block", 0.3, 0.0, 0.3, 0.2, 1024, True),
    "convnextv2_nano": (2e-4, 600, 0, 0.9, "block", 0.3, 0.1, 0.5, 0.2, 1024, True),
    "convnextv2_tiny": (8e-4, 300, 40, 0.9, "block", 0.05, 0.2, None, 0.1, 1024, True),
    "convnextv2_base": (6.25e-4, 100, 20, 0.6, "group", 0.05, 0.1, None, 0.1, 1024, True),
    "convnextv2_large": (6.25e-4, 100, 20, 0.6, "group", 0.05, 0.2, None, 0.1, 1024, True),
    "convnextv2_huge": (1.25e-3, 50, 10, 0.75, "block", 0.05, 0.3, None, 0.1, 1024, True),
    "convnextv2_nano_in22k": (2.5e-4, 90, 5, 0.9, "block", 0.05, 0.0, None, 0.1, 4096, False),
    "convnextv2_tiny_in22k": (2.5e-4, 90, 5, 0.9, "block", 0.05, 0.0, None, 0.1, 4096, False),
    "convnextv2_base_in22k": (2.5e-4, 90, 5, 0.8, "group", 0.05, 0.1, None, 0.1, 4096, False),
    "convnextv2_large_in22k": (2.5e-4, 90, 5, 0.8, "group", 0.05, 0.1, None, 0.1, 4096, False),
    "convnextv2_huge_in22k": (2.5e-4, 90, 5, 0.8, "block", 0.05, 0.3, None, 0.1, 4096, False),
    "convnextv2_nano_in22k_in1k": (2.5e-5, 90, 0, 0.9, "block", 1e-8, 0.1, 0.0, 0.1, 512, True),
    "convnextv2_tiny_in22k_in1k": (2.5e-5, 90, 0, 0.9, "block", 1e-8, 0.1, 0.0, 0.1, 512, True),
    "convnextv2_base_in22k_in1k": (2.5e-5, 30, 0, 0.8, "group", 1e-8, 0.2, 0.0, 0.1, 512, True),
    "convnextv2_large_in22k_in1k": (2.5e-5, 30, 0, 0.8, "group", 1e-8, 0.3, 0.0, 0.1, 512, True),
    "convnextv2_huge_in22k_in1k": (2.5e-5, 30, 0, 0.85, "block", 1e-8, 0.5, 0.0, 0.1, 512, False),
    "vit_base": (5e-4, 100, 5, 0.65, "block", 0.05, 0.1, None, 0.1, 1024, False),
    "vit_large": (1e-3, 50, 5, 0.75, "block", 0.05, 0.2, None, 0.1, 1024, False),
    "vit_huge": (1e-3, 50, 5, 0.75, "block", 0.05, 0.3, None, 0.1, 1024, False),
}
ACCURACY = {
    "atto": 76.7,
    "femto": 78.5,
    "pico": 80.3,
    "nano": 81.9,
    "tiny": 83.0,
    "base": 84.9,
    "large": 85.8,
    "huge": 86.3,
}
AFTER_22K = {
    "nano": {224: 82.1, 384: 83.4}, "tiny": {224: 83.9, 384: 85.1}, "base": {224: 86.8, 384: 87.7},
    "large": {224: 87.3, 384: 88.2}, "huge": {384: 88.7, 512: 88.9},
}  # fmt: skip


def head(path: Path) -> str:
    return " ".join(line[2:].strip() for line in path.read_text().splitlines() if line.startswith("#"))


RECIPES = sorted(CONFIGS.glob("finetune/*_*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_as_published(path):
    config = settings.load(FinetuneConfig, path, DATA)
    t, d, m = config.train, config.data, config.model
    *row, mixing, smoothing, batch, ema = PUBLISHED[re.sub(r"_\d{3}$", "", path.stem)]
    found = (t.base_lr, t.epochs, t.warmup_epochs, t.layer_decay, t.layer_decay_scheme, t.weight_decay, m.drop_path)
    assert found == tuple(row)
    assert (d.mixup, d.cutmix) == ((0.8, 1.0) if mixing is None else (mixing, mixing))
    assert (t.label_smoothing, t.effective_batch, config.ema.enabled) == (smoothing, batch, ema)
    assert (d.random_erasing, d.randaugment, m.head_init_scale) == (0.25, "rand-m9-mstd0.5-inc1", 0.001)
    assert config.ema.decay == 0.9999 and t.betas == [0.9, 0.999]
    # Beyond 224 px the authors' code scales whole images to the size, whatever their sides.
    assert (d.crop_pct, d.crop_mode) == ((1.0, "squash") if m.image_size > 224 else (None, "center"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(path):
    config = settings.load(FinetuneConfig, path, DATA)
    checks.check(config)
    assert config.model.name in {named.timm for named in MODELS.values()}
    schedule, batch = make_schedule(config.train, 1_281_167, world_size=8), config.train.effective_batch
    assert schedule.effective_batch == batch and schedule.peak_lr == pytest.approx(config.train.base_lr * batch / 256)
    said = head(path)
    assert all(word in said for word in ("Reproduces:", "Command:", "Cost:", "Expected:", f"ffective batch {batch}"))
    if "_in22k" not in path.stem or "_in1k" in path.stem:
        assert f"{schedule.steps:,} optimizer steps" in said


@pytest.mark.parametrize("size", ACCURACY)
def test_the_reference_accuracies(size):
    assert f"{ACCURACY[size]} % top-1" in head(CONFIGS / "finetune" / f"convnextv2_{size}.yaml")
    for px, accuracy in AFTER_22K.get(size, {}).items():
        path = CONFIGS / "finetune" / f"convnextv2_{size}_in22k_in1k_{px}.yaml"
        assert f"{accuracy} % top-1 at {px} px" in head(path)
        assert settings.load(FinetuneConfig, path, []).model.image_size == px


@pytest.mark.parametrize("size,epochs", [("base", 90), ("large", 50), ("huge", 50)])
def test_published_linear_probing(size, epochs):
    config = settings.load(ProbeConfig, CONFIGS / "probe" / f"vit_{size}_linear.yaml", DATA)
    checks.check(config)
    t, d = config.train, config.data
    assert (t.optimizer, t.base_lr, t.weight_decay, t.epochs, t.warmup_epochs) == ("lars", 0.1, 0, epochs, 10)
    assert make_schedule(t, 1_281_167, 4).peak_lr == pytest.approx(6.4) and config.probe.batch_norm
    assert not (d.randaugment or d.random_erasing or d.mixup or d.cutmix or t.label_smoothing) and d.flip == 0.5
    assert (config.model.pool, config.model.drop_path, config.model.head_init_scale * 0.02) == ("token", 0, 0.01)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("probe/*.yaml")), ids=lambda path: path.stem)
def test_every_probe_runs(path):
    checks.check(settings.load(ProbeConfig, path, [*DATA, "model.name=vit_large_patch16_224"]))
    assert all(word in path.read_text() for word in ("Command:", "Cost:", "Expected:"))


@pytest.mark.parametrize("model", ["convnextv2_atto", "vit_tiny_patch16_224"])
def test_the_small_recipe_decays_layers_of_both(model):
    config = settings.load(FinetuneConfig, CONFIGS / "finetune" / "small.yaml", [*DATA, f"model.name={model}"])
    checks.check(config)
    assert groups.scheme_of(find_start(config).spec, config.train) == "block"


def test_free_keys_exist():
    known = set(settings.describe(FinetuneConfig))
    assert set(FREE_KEYS) <= set(BRANCH_KEYS) <= known
    assert set(BRANCH_KEYS) - {"eval_only"} <= set(settings.describe(ProbeConfig))
