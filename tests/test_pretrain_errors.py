"""Bad input to `python -m fcmae.pretrain`: one line, exit status 2, nothing written or overwritten."""

import io
import pickle
import subprocess
import sys

import pytest
import torch

import fcmae
from fcmae.pretrain import main
from small_runs import CONFIG, make_pictures, run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    make_pictures(folder / "pictures", 12)
    (folder / "config.yaml").write_text(CONFIG.replace("steps: 60", "steps: 2"))
    (folder / "empty").mkdir()
    (folder / "list.txt").write_text("pictures/000.png\npictures/none.png\n")
    return folder


def refused(capsys, config, *overrides) -> str:
    """The one line that `main` prints for bad input."""
    assert main([str(config), *overrides]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fcmae.pretrain: error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err + out
    return err


CASES = [  # override, words of the message
    ("data.source={place}/nowhere", ["nowhere"]),
    ("data.source={place}/empty", ["empty", ".jpg"]),
    ("data.source={place}/list.txt", ["none.png", "line 2"]),
    ("data.source=null", ["data.source", "sample"]),
    ("model.image_size=100", ["height 100", "96 and 128"]),
    ("model.image_size=[64,70]", ["width 70", "64 and 96"]),
    ("model.image_size=20", ["height 20", "smallest is 32"]),
    ("model.image_size=big", ["model.image_size=big", "[height, width]"]),
    ("mask.ratio=0.95", ["mask_ratio=0.95", "keeps none of the 4 regions"]),
    ("mask.ratio=0.1 model.image_size=32", ["none of the 1 regions"]),
    ("mask.ratio=0", ["between 0 and 1"]),
    ("mask.ratio=1", ["between 0 and 1"]),
    ("mask.strategy=blocks", ["mask.strategy=blocks", "random, block, grid"]),
    ("train.btch_size=4", ["unknown setting 'train.btch_size'", "'train.batch_size'"]),
    ("batch_size=4", ["unknown setting 'batch_size'", "'train.batch_size'"]),
    ("train=4", ["train is a group of settings", "train.batch_size"]),
    ("train.batch_size=many", ["train.batch_size=many", "int", "many"]),
    ("train.batch_size=1.5", ["train.batch_size", "int"]),
    ("loss.norm_pix=perhaps", ["loss.norm_pix", "bool"]),
    ("train.betas=[0.9,1.5]", ["train.betas", "[0, 1)"]),
    ("model.name=fcmae_convnextv2_small", ["fcmae_convnextv2_small", "fcmae_convnextv2_tiny"]),
    ("model.name=resnet50", ["resnet50", "fcmae_convnextv2_atto"]),
    ("model.depths=[1,2]", ["four positive numbers"]),
    ("device=cuda:7", ["cuda:7", "not there"]),
    ("device=gpu", ["gpu", "auto, cpu, cuda"]),
    ("train.batch_size=13", ["batch of 13", "dataset of 12"]),
    ("train.effective_batch=16", ["batch of 16", "lower train.effective_batch"]),
    ("train.effective_batch=8 train.accum_steps=3", ["train.accum_steps=3", "disagree"]),
    ("train.epochs=.inf train.steps=null", ["train.epochs=inf", "finite"]),
    ("data.source=sample model.in_chans=13", ["32 images in a row", "in_chans=13"]),
    ("mask.ratio=1.0e-17", ["masks none of the 4 regions"]),
    ("model.image_size=-32", ["whole number of pixels"]),
    ("train.accum_steps=2", ["batch of 16", "dataset of 12"]),
    ("train.effective_batch=12", ["effective_batch=12", "8 x 1"]),
    ("train.warmup_epochs=9", ["warmup_epochs=9"]),
    ("train.precision=fp8", ["fp32, bf16, fp16"]),
    ("sparse.backend=fast", ["fast", "reference"]),
    ("sparse.grn=layer", ["layer", "per_image"]),
    ("loss.norm_window=48", ["norm_window=48"]),
    ("data.mean=[0.5]", ["mean", "in_chans=3"]),
    ("data.crop_scale=[1.0,0.2]", ["data.crop_scale"]),
    ("nonsense", ["key=value"]),
    ("train.lr=", ["no value", "train.lr=null"]),
    ("=3", ["key=value"]),
    ("model.image_size=[64", ["model.image_size=[64", "cut short", "spaces", "quotes"]),
    ("model.image_size=[64, 96]", ["'model.image_size=[64,'", "'model.image_size=[64, 96]'"]),
    ("data.crop_scale=0.5", ["data.crop_scale takes [float, ...]", "data.crop_scale=[0.2,1.0]", "got 0.5"]),
    ("train.betas=[0.9,[0.95]]", ["train.betas takes [float, ...]", "got [0.9, [0.95]]"]),
    ("train.lr=abc", ["train.lr takes float | null, a number", 'got "abc"']),
    ("train.lr=???", ["train.lr is ???"]),
    ("data.source=", ["gives no value", "data.source takes str | null: folder"]),
    ("train.lr=1e-3 train.base_lr=1e-4", ["train.base_lr=1e-4 has no effect", "train.lr=null"]),
    ("mask_ratio=0.5", ["unknown setting 'mask_ratio' (did you mean 'mask.ratio'?)"]),
    ("--train.batch-size=8", ["did you mean 'train.batch_size'?"]),
    ("data.source=t-000.tar data.source=t-001.tar", ["data.source is given twice in a row", "quotes"]),
    (f"seed={2**64}", ["seed=", "less than 2 ** 64"]),
    ("resume={place}/none.pt", ["none.pt", "no such checkpoint file"]),
    ("resume={place}/pictures/000.png", ["000.png", "not a whole checkpoint"]),
    ("out={place}/config.yaml/x", ["cannot write", "out="]),
]


@pytest.mark.parametrize("overrides,words", CASES, ids=[c[0].replace("{place}/", "") for c in CASES])
def test_one_line_and_nothing_written(place, tmp_path, capsys, overrides, words):
    given = [o.format(place=place) for o in overrides.split()]
    error = refused(
        capsys, place / "config.yaml", f"data.source={place / 'pictures'}", f"out={tmp_path / 'run'}", *given
    )
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


def test_config_file_and_usage(place, tmp_path, capsys):
    assert "no such config file" in refused(capsys, tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("train: [1, 2")
    assert "not valid YAML" in refused(capsys, tmp_path / "broken.yaml")
    assert "is a folder: name a config file" in refused(capsys, tmp_path)
    (tmp_path / "step_000000001.pt").write_bytes(b"PK")
    error = refused(capsys, tmp_path / "step_000000001.pt")
    assert f"CONFIG.yaml resume={tmp_path}/step_000000001.pt" in error
    error = refused(capsys, place / "config.yaml", "resume=~/none.pt", f"out={tmp_path}/x", f"data.source={place}")
    assert "no such checkpoint file" in error and "~" not in error
    (tmp_path / "typo.yaml").write_text("model: {nme: x}\n")
    assert "typo.yaml: unknown setting 'model.nme' (did you mean 'model.name'" in refused(
        capsys, tmp_path / "typo.yaml"
    )
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "key: value" in refused(capsys, tmp_path / "list.yaml")
    for tag in ("int", "bool", "timestamp"):
        (tmp_path / "tag.yaml").write_text(f"seed: !!{tag} x\n")
        assert "tag.yaml is not valid YAML" in refused(capsys, tmp_path / "tag.yaml")
        assert f"seed=!!{tag} x" in refused(capsys, place / "config.yaml", f"seed=!!{tag} x")
    (tmp_path / "number.yaml").write_text("3\n")
    assert "number.yaml must hold `key: value`" in refused(capsys, tmp_path / "number.yaml")
    assert "CONFIG.yaml" in refused(capsys, "data.source=x")
    assert "out=" in refused(capsys, place / "config.yaml", f"data.source={place / 'pictures'}")
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for key in ("model.image_size", "train.accum_steps", "data.source", "0.00015"):
        assert key in text


def test_the_package_names_its_commands():
    command = [sys.executable, "-m", "fcmae"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0 and "python -m fcmae.pretrain" in shown.stdout and not shown.stderr
    wrong = subprocess.run([*command, "pretrian"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "'pretrian' follows no command" in wrong.stderr
    version = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert version.returncode == 0 and version.stdout.strip() == fcmae.__version__


class Payload:
    def __reduce__(self):
        return (open, ("ran-code", "w"))


def test_resume_from_what_is_no_checkpoint_of_this_run(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = f"data.source={place / 'pictures'}"
    run(place / "config.yaml", source, f"out={tmp_path / 'first'}")
    checkpoint = next((tmp_path / "first" / "checkpoints").iterdir())

    def resumed(path, *more):
        return refused(capsys, place / "config.yaml", source, f"out={tmp_path / 'second'}", f"resume={path}", *more)

    assert "another run (train.weight_decay: 0.05 -> 0.1)" in resumed(checkpoint, "train.weight_decay=0.1")
    assert "another run (train.precision: fp32 -> fp16)" in resumed(checkpoint, "train.precision=fp16")
    assert "at step 2, beyond this run's 1" in resumed(checkpoint, "train.steps=1", "train.warmup_epochs=0")
    error = resumed(checkpoint, "model.dims=[8,12,16,32]")
    assert "another model (model.dims: [8, 12, 16, 24] -> [8, 12, 16, 32])" in error
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:-500])
    assert "not a whole checkpoint" in resumed(tmp_path / "cut.pt")
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "foreign.pt")
    assert "not a checkpoint of this toolkit" in resumed(tmp_path / "foreign.pt")
    torch.save({"model": Payload()}, tmp_path / "code.pt")
    assert "code.pt" in resumed(tmp_path / "code.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Payload()))
    assert "pickle.pt" in resumed(tmp_path / "pickle.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "empty.pt" in resumed(tmp_path / "empty.pt")
    assert not (tmp_path / "ran-code").exists() and not (tmp_path / "second").exists()
    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    assert b"ran-code" in buffer.getvalue()  # the payload was real


def test_a_folder_of_another_run_is_not_touched(place, tmp_path, capsys):
    source, out = f"data.source={place / 'pictures'}", tmp_path / "run"
    run(place / "config.yaml", source, f"out={out}")

    def contents():
        return {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}

    before = contents()
    error = refused(capsys, place / "config.yaml", source, f"out={out}", "train.lr=0.5", "mask.ratio=0.5")
    assert "holds another run (mask.ratio: 0.6 -> 0.5; train.lr: 0.001 -> 0.5)" in error and "out=" in error
    (out / "config.yaml").rename(tmp_path / "config.yaml")
    assert "no config.yaml" in refused(capsys, place / "config.yaml", source, f"out={out}")
    (tmp_path / "config.yaml").rename(out / "config.yaml")
    assert before == contents()
