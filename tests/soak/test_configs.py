"""Made-up settings: valid ones start, invalid ones are refused in one line with exit status 2."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import labelled_runs
import small_runs
from fcmae import config as settings
from fcmae.cli import run_command
from fcmae.comparison.settings import arms_of, check_alike
from fcmae.data.transforms import make_transform
from fcmae.downstream import checks as downstream_checks
from fcmae.downstream.augment import objective, training_transform
from fcmae.downstream.frozen import last_blocks
from fcmae.downstream.groups import make_groups
from fcmae.downstream.start import build, find_start
from fcmae.errors import UsageError
from fcmae.masking import draw_mask, grid_size
from fcmae.pretrain import build_model
from fcmae.train import checks, family
from fcmae.train.distributed import pick_device
from fcmae.train.schedule import make_schedule
from soak import made_settings
from soak.made_settings import IMAGES, SCHEMAS, VALID

pytestmark = pytest.mark.soak
SEED = 20_302
# Settings that these tests leave to others: files, which tests/soak/test_corruption.py damages, and what needs a run.
ELSEWHERE = {"data.labelled", "init", "resume", "eval_only", "arms"}
PRETRAINING_ALONE = {  # a comparison's arms have them, too, but for its budget, which is the length
    "train.compile", "train.sharding", "train.spike_factor", "train.seconds", "train.steps", "mask.unit", "loss.pca",
    "loss.norm_window",
}  # fmt: skip


def examples(count: int, short: bool):
    """So many, the same ones each time; a failing one is made smaller in the long form alone, as that takes minutes."""
    return hypothesis_settings(
        max_examples=count, deadline=None, print_blob=True, database=None,
        phases=[Phase.generate] if short else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def starts(command: str, config) -> int:
    """Everything of a run before its first step, on the meta device, but for its images."""
    pick_device(config.device)
    if command == "compare":
        arms = arms_of(config)
        made = {name: start_pretraining(arm) for name, arm in arms.items()}
        check_alike({n: m for n, (m, _) in made.items()}, {n: s for n, (_, s) in made.items()})
    elif command == "pretrain":
        checks.check(config)
        family.fill(config)
        start_pretraining(config)
    else:
        start_downstream(command, config)
    return 0


def start_pretraining(config):
    with torch.device("meta"):
        model = build_model(config)
    d = config.data
    make_transform(
        model.image_size, config.model.in_chans, tuple(d.crop_scale), d.flip, d.mean, d.std, d.crop, d.color_jitter
    )
    drawn = draw_mask(
        np.random.default_rng(0), grid_size(model.image_size, model.mask_unit), model.mask_ratio, config.mask.strategy
    )
    assert 0 < drawn.sum() < drawn.size
    return model, check_schedule(make_schedule(config.train, IMAGES, 1))


def start_downstream(command: str, config) -> None:
    downstream_checks.check(config)
    check_schedule(make_schedule(config.train, IMAGES, 1))
    training_transform(config)
    objective(config, 4)
    with torch.device("meta"):
        start = find_start(config)
        model = build(start, 4, config)
        if command == "probe" and config.probe.mode == "partial":
            for count in config.probe.blocks:
                last_blocks(start.spec, count)
    make_groups(model, start.spec, config.train)


def check_schedule(schedule):
    total = schedule.steps or 10
    for share in (0.0, 0.1, 0.5, 0.999):
        step, seconds = int(share * total), share * (schedule.seconds or 0.0)
        # Half a cosine never leaves its ends by more than rounding does.
        assert -1e-9 <= schedule.lr_at(step, seconds) <= schedule.peak_lr * (1 + 1e-9) + 1e-9
    return schedule


def run_main(command: str, words: list[str], start=None) -> tuple[int, str]:
    """Status and standard error of a command in this process; start: what to do with the configuration in its place."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if start is None:
            status = importlib.import_module(f"fcmae.{command}").main(words)
        else:
            status = run_command(f"fcmae.{command}", SCHEMAS[command], start, words)
    return status, err.getvalue()


def sources(command: str, place: Path) -> dict[str, str]:
    if command in ("pretrain", "compare"):
        return {"data.source": str(place / "pictures")}
    return {"data.train": str(place / "shapes" / "train"), "data.val": str(place / "shapes" / "val")}


def many(command: str, place: Path) -> dict[str, str]:
    """The same with IMAGES images, so that a batch of valid settings is not larger."""
    if command in ("pretrain", "compare"):
        return {"data.source": "sample"}
    return {"data.train": str(place / "many.csv"), "data.val": str(place / "shapes" / "val")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    small_runs.make_pictures(folder / "pictures", 12)
    labelled_runs.make_place(folder)
    files = sorted((folder / "shapes" / "train").rglob("*.png"))
    rows = [f"{files[i % len(files)]},{files[i % len(files)].parent.name}" for i in range(IMAGES)]
    (folder / "many.csv").write_text("\n".join(["path,label", *rows]))
    return folder


@pytest.mark.parametrize("command", VALID)
def test_what_is_valid_starts(command, place, tmp_path, monkeypatch, often, figures):
    monkeypatch.chdir(tmp_path)
    counts, drawn = Counter(), set()
    short = often(False, True)

    @seed(SEED)
    @examples(often(400, 4), short)
    @given(st.data())
    def check(data):
        found = data.draw(VALID[command]()) | sources(command, place)
        words = made_settings.arguments(found, data.draw, tmp_path)
        status, err = run_main(command, words, lambda config: starts(command, config))
        assert status == 0, f"{err}\n{found}"
        counts["started"] += 1
        drawn.update(key.split(".", 2)[2] if key.startswith("arms.") else key for key in found)

    check()
    left_out = set(settings.describe(SCHEMAS[command])) - drawn
    assert short or left_out <= ELSEWHERE | (set() if command == "pretrain" else PRETRAINING_ALONE), left_out
    figures(f"valid_settings_of_{command}", **counts, settings=len(drawn))


@pytest.mark.parametrize("command", VALID)
def test_what_is_invalid_is_one_line(command, place, tmp_path, monkeypatch, often, figures):
    """By the command's own `main`, which must not come to write anything."""
    monkeypatch.chdir(tmp_path)
    counts = Counter()
    short, out = often(False, True), tmp_path / "out"

    @seed(SEED)
    @examples(often(800, 12), short)
    @given(st.data())
    def check(data):
        found, behind, names = data.draw(made_settings.broken(command))
        if names != "out":
            found |= {"out": str(out)}
        words = made_settings.arguments(many(command, place) | found, data.draw, tmp_path)
        status, err = run_main(command, [*words, *behind])
        written = out.exists()
        shutil.rmtree(out, ignore_errors=True)  # not to be the next example's
        said = f"{names}: {err}\n{found} {behind}"
        assert status == 2, said
        assert len(err.splitlines()) == 1 and err.startswith(f"fcmae.{command}: error: "), said
        leaf = names.rpartition(".")[2]
        known = (names, leaf, *MEANT.get(names, ()))
        assert any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", err) for name in known), said
        assert not written, said
        counts["refused"] += 1

    check()
    figures(f"invalid_settings_of_{command}", **counts)


# What an error may say in place of the setting's own name, where that is derived from several.
MEANT = {
    "model.image_size": ("image height", "image width", "image_size"), "model.in_chans": ("in_chans", "channels"),
    "model.name": ("unknown model",), "train.batch_size": ("batch",), "train.accum_steps": ("batch", "accum_steps"),
}  # fmt: skip


FILES = {  # a config file's bytes, words of the error
    "empty": (b"", ["data.source"]),
    "no text": (b"\xff\xfe\x00\x01", ["not valid YAML"]),
    "latin 1": ("out: ünï\n".encode("latin-1"), ["not valid YAML"]),
    "NUL": (b"out: a\0b\n", ["not valid YAML"]),
    "list": (b"- a\n- b\n", ["key: value"]),
    "word": (b"hello\n", ["'hello'"]),
    "number": (b"3\n", ["key: value"]),
    "open bracket": (b"train: [1, 2\n", ["not valid YAML"]),
    "tab": (b"train:\n\tlr: 1\n", ["not valid YAML"]),
    "twice": (b"train:\n  lr: 1\n  lr: 2\n", ["not valid YAML", "duplicate"]),
    "twice at top": (b"out: a\nout: b\n", ["not valid YAML", "duplicate"]),
    "object": (b"out: !!python/object/apply:os.system ['touch ran']\n", ["not valid YAML"]),
    "tag": (b"out: !mine 3\n", ["not valid YAML"]),
    "anchor of itself": (b"train: &a\n  lr: *a\n", []),
    "dotted": (b"train.lr: 3\n", []),
    "number as key": (b"1: 3\n", []),
    "null as key": (b"null: 3\n", []),
    "two documents": (b"out: a\n---\nout: b\n", ["not valid YAML"]),
    "missing": (b"train:\n  lr: ???\n", ["train.lr is ???"]),
    "interpolation": (b"out: ${nothing}\n", ["nothing"]),
    "broken interpolation": (b"out: ${nothing\n", []),
    "environment": (b"out: ${oc.env:NO_SUCH_VARIABLE}\n", ["NO_SUCH_VARIABLE"]),
    "text as list": (b"out: [1]\n", ["out takes str"]),
    "group as list": (b"train: [1]\n", ["train is a group"]),
    "group as null": (b"train:\n", ["train is a group"]),
    "deep": (b"a: " + b"[" * 3000, []),
    "deep and closed": (b"out: " + b"[" * 3000 + b"]" * 3000, []),
    "no number": (b"seed: !!int x\n", ["not valid YAML"]),
    "no truth": (b"seed: !!bool x\n", ["not valid YAML"]),
    "no time": (b"seed: !!timestamp x\n", ["not valid YAML"]),
    "no date": (b"out: 2026-99-99\n", []),
}  # fmt: skip


@pytest.mark.parametrize("command", VALID)
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_configuration(command, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, words = FILES[name]
    (tmp_path / "c.yaml").write_bytes(data)
    status, err = run_main(command, ["c.yaml"])
    assert status == 2 and len(err.splitlines()) == 1, err
    if words != ["data.source"] or command == "pretrain":
        assert all(word in err for word in words) or name == "empty", err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml"]


WORDS = [  # as a shell hands them over, words of the error
    (["model.image_size=[64,", "96]"], ["model.image_size", "cut short", "quotes"]),
    (["model.image_size=[64", "96]"], ["model.image_size", "cut short"]),
    (["data.crop_scale=0.5"], ["data.crop_scale takes", "[0."]),
    (["train.lr=abc"], ["train.lr takes float", "a number"]),
    (["train.lr="], ["train.lr", "no value", "null"]),
    (["train_lr=1"], ["did you mean 'train.lr'?"]),
    (["--train.lr=1"], ["did you mean 'train.lr'?"]),
    (["train.lr", "1"], ["key=value"]),
    (["train.lr:1"], ["key=value"]),
    (["=1"], ["key=value"]),
    (["out=a-000.tar", "out=a-001.tar", "out=a-002.tar"], ["out is given twice in a row", "quotes"]),
    (["train.lr={a"], ["train.lr"]), (["train.lr=*x"], ["train.lr"]), (["train.lr=!!int x"], ["train.lr"]),
    (["train.lr=!!bool x"], ["train.lr"]), (["train.lr=" + "[" * 999 + "]" * 999], ["train.lr"]),
]  # fmt: skip


@pytest.mark.parametrize("command", VALID)
@pytest.mark.parametrize("words,expected", WORDS, ids=[" ".join(w)[:40] for w, _ in WORDS])
def test_words_as_a_shell_hands_them_over(command, words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("seed: 0\n")
    status, err = run_main(command, ["c.yaml", *words])
    assert status == 2 and len(err.splitlines()) == 1 and all(word in err for word in expected), err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml"]


def test_valid_settings_run_as_commands(place, tmp_path, often, figures):
    """A step of a real run, in a process of its own."""
    counts = Counter()

    @seed(SEED + 1)
    @examples(often(20, 1), True)
    @given(st.data())
    def check(data):
        command = data.draw(st.sampled_from(["pretrain", "finetune", "pretrain", "probe"]))
        fixed = {"out": str(tmp_path / "run"), "train.batch_size": 4, "train.warmup_epochs": 0.0, "train.steps": 1,
                 "data.workers": 0, "train.min_lr": 0.0, "device": "cpu", "data.max_bad_share": 1.0}  # fmt: skip
        gone = ("train.epochs", "train.seconds", "train.accum_steps", "train.effective_batch")
        found = {k: v for k, v in data.draw(VALID[command](tiny=True)).items() if k not in gone}
        if found.get("loss.pca") is not None:
            found["loss.pca"] = min(found["loss.pca"], 8)
        words = made_settings.arguments(found | sources(command, place) | fixed, data.draw, tmp_path)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        done = subprocess.run([sys.executable, "-m", f"fcmae.{command}", *words], env=small_runs.environment(),
                              capture_output=True, text=True, timeout=600)  # fmt: skip
        assert done.returncode == 0, f"{done.stderr[-2000:]}\n{found}"
        counts[command] += 1

    check()
    figures("valid_settings_run", **counts)


def test_a_check_that_is_too_strict_is_noticed(place, tmp_path):
    def strict(config):
        raise UsageError("no")

    path = tmp_path / "c.yaml"
    path.write_text("seed: 0\n")
    found = {"train.batch_size": 64, "out": "x"} | sources("pretrain", place)
    words = [str(path), *(f"{key}={value}" for key, value in found.items())]
    assert run_main("pretrain", words, lambda config: starts("pretrain", config))[0] == 0
    assert run_main("pretrain", words, strict)[0] == 2
