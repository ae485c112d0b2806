"""The configuration: layers, types, help, and the recipes that are shipped."""

from pathlib import Path

import pytest

from fcmae import config as settings
from fcmae.models import MODELS
from fcmae.schema import Config, TrainConfig
from fcmae.train.checks import check
from fcmae.train.schedule import make_schedule

CONFIGS = Path(__file__).parent.parent / "configs" / "pretrain"


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {batch_size: 7, base_lr: 1e-3}\nmodel: {image_size: [64, 96]}\n")
    loaded = settings.load(Config, tmp_path / "a.yaml", ["train.batch_size=9", "model.dims=[1,2,3,4]"])
    assert (loaded.train.batch_size, loaded.train.base_lr, loaded.train.betas) == (9, 1e-3, [0.9, 0.95])
    assert loaded.model.image_size == [64, 96] and loaded.model.dims == [1, 2, 3, 4]
    assert isinstance(loaded, Config) and isinstance(loaded.train, TrainConfig)


def test_a_written_config_loads_as_the_same(tmp_path):
    (tmp_path / "a.yaml").write_text("out: x\ntrain: {lr: 1.0e-3, betas: [0.8, 0.9]}\n")
    loaded = settings.load(Config, tmp_path / "a.yaml", [])
    settings.write_yaml(loaded, tmp_path / "b.yaml")
    assert settings.load(Config, tmp_path / "b.yaml", []) == loaded
    assert settings.differences(settings.read_yaml(tmp_path / "b.yaml"), settings.to_dict(loaded)) == []


def test_help_lists_every_key_with_type_default_and_a_line():
    text = settings.help_text("fcmae.pretrain", Config)
    rows = settings.describe(Config)
    assert len(rows) > 40
    for key, (kind, _, line) in rows.items():
        assert f"  {key} " in text and kind in text and line in text and len(line) > 5
    assert rows["train.clip_grad"][0] == "float | null" and rows["model.image_size"][0] == "int | [int, int]"


def test_free_keys_exist():
    assert set(settings.FREE_KEYS) <= set(settings.describe(Config))


@pytest.mark.parametrize("name", MODELS)
def test_published_recipes(name):
    recipe = settings.load(Config, CONFIGS / f"{name}.yaml", ["data.source=x"])
    check(recipe)
    assert recipe.model.name == name and recipe.out == f"runs/{name}"
    schedule = make_schedule(recipe.train, 1_281_167, world_size=8)
    assert schedule.effective_batch == 4096
    assert schedule.peak_lr == pytest.approx(1.5e-4 * 4096 / 256)
    assert (schedule.epochs, schedule.warmup_epochs, schedule.steps) == (800, 40, 250_228)
    ratio = 0.6 if name.startswith("fcmae") else 0.75
    assert (recipe.train.weight_decay, recipe.train.betas, recipe.mask.ratio) == (0.05, [0.9, 0.95], ratio)
    assert recipe.loss.norm_pix and recipe.data.crop_scale == [0.2, 1.0] and recipe.data.flip == 0.5
    head = (CONFIGS / f"{name}.yaml").read_text()
    for word in ("Command:", "Cost:", "Expected:", "train.epochs=1600"):
        assert word in head
