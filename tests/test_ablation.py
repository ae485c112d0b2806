"""The published ablations: every config and row, small runs of each, and what such runs leave, resume and refuse."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fcmae import config as settings
from fcmae.compare import main as compare
from fcmae.convert import main as convert
from fcmae.convert import read_checkpoint
from fcmae.pretrain import build_model, main
from fcmae.schema import Config
from fcmae.train.checks import check
from fcmae.train.schedule import make_schedule
from helpers import close, shake
from small_runs import CONFIG, assert_same_run, final_state, make_pictures, metrics, printed_model, run

FILES = sorted((Path(__file__).parent.parent / "configs" / "ablation").glob("*.yaml"))
MAE_CONFIG = """
model: {name: mae_vit_tiny_patch16, image_size: 64, dim: 32, depth: 2, heads: 2, decoder_dim: 32, decoder_depth: 1}
train: {steps: 20, batch_size: 8, warmup_epochs: 1, lr: 1.0e-3}
data: {workers: 0}
log: {tensorboard: false, images: 0, print_every: 1}
device: cpu
"""


def rows(file: Path) -> list[list[str]]:
    """The overrides of each row in the head of a config."""
    lines = file.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("# Rows:"))
    found = []
    for line in lines[first + 1 :]:
        if not (match := re.fullmatch(r"#   ((?:[\w.]+=\S+ ?)+)(?: .*)?", line)):
            break
        found.append(match[1].split())
    return found


def small(file: Path) -> list[str]:
    """The overrides of the command that its head gives for a laptop."""
    head = file.read_text().split("# Small:")[1].split("# Cost:")[0]
    assert head.split()[:4] == ["python", "-m", "fcmae.pretrain", f"configs/ablation/{file.name}"]
    assert head.split()[-1] == "ROW"
    return [word for word in head.split() if "=" in word]


ROWS = [(file, row) for file in FILES for row in rows(file)]
IDS = [f"{file.stem}-{'-'.join(row)}" for file, row in ROWS]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("ablation") / "pictures")


def test_every_published_ablation_has_a_file():
    names = {file.stem: len(rows(file)) for file in FILES}
    assert names == {
        "mae_decoder_depth": 5, "mae_decoder_width": 5, "mae_mask_token": 2, "mae_target": 3, "mae_augmentation": 4,
        "mae_mask_sampling": 4, "mae_mask_ratio": 10, "fcmae_decoder": 3, "fcmae_decoder_depth": 5,
        "fcmae_decoder_width": 5, "fcmae_norm": 5, "fcmae_mask_ratio": 9,
    }  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_files_hold_the_published_recipe(file):
    recipe = settings.load(Config, file, ["data.source=x"])
    check(recipe)
    is_mae = file.stem.startswith("mae")
    assert recipe.model.name == ("mae_vit_large_patch16" if is_mae else "fcmae_convnextv2_base")
    assert recipe.mask.ratio == (0.75 if is_mae else 0.6) and recipe.loss.norm_pix != is_mae
    assert (recipe.model.norm == "none") == ("decoder" in file.stem and not is_mae)
    schedule = make_schedule(recipe.train, 1_281_167, world_size=8)
    assert (schedule.effective_batch, schedule.epochs, schedule.steps) == (4096, 800, 250_228)
    assert schedule.peak_lr == pytest.approx(2.4e-3) and recipe.out == f"runs/{file.stem}"
    head = file.read_text()
    for word in ("Reproduces:", "Rows:", "Command:", "Small:", "Cost:", "Expected:", "Not rerun", "arXiv 2"):
        assert word in " ".join(head.replace("\n#", " ").split()), word


@pytest.mark.parametrize("file,row", ROWS, ids=IDS)
def test_every_row_is_a_model(file, row):
    """On the meta device, all settings checked, and of the published size."""
    config = settings.load(Config, file, ["data.source=x", *row])
    check(config)
    with torch.device("meta"):
        model = build_model(config)
    assert model.mask_ratio == config.mask.ratio
    assert sum(p.numel() for p in model.encoder_parameters()) > (3e8 if "mae_vit" in config.model.name else 8.7e7)


def train_small(file, row, pictures, out, *more):
    """Two steps of the laptop's variant on tiny pictures."""
    tiny = ["data.workers=0", "train.batch_size=2", "train.steps=2", "train.warmup_epochs=0", "log.tensorboard=false"]
    tiny += ["log.images=0", "device=cpu", f"data.source={pictures}", f"out={out}"]
    overrides = [word for word in small(file) if not word.startswith(("data.source", "out="))]
    assert main([str(file), *overrides, *tiny, *row, *more]) == 0
    losses = [line["loss"] for line in metrics(out)]
    assert len(losses) == 2 and all(loss is not None and 0 < loss for loss in losses)


QUICK = ("data.color_jitter=0.4", "model.decoder=unet")


@pytest.mark.parametrize(
    "file,row",
    [pytest.param(f, r, marks=[] if r[-1] in QUICK else [pytest.mark.slow]) for f, r in ROWS],
    ids=IDS,
)
def test_every_row_trains_on_a_laptop(file, row, pictures, tmp_path):
    train_small(file, row, pictures, tmp_path / "run", "model.decoder_depth=1" if row[-1] in QUICK else "seed=1")


VARIANTS = {
    "v1": (CONFIG, ["model.norm=none"]),
    "ln": (CONFIG, ["model.norm=ln"]),
    "bn_pca": (CONFIG, ["model.norm=bn", "loss.pca=8", "model.in_chans=1"]),
    "lrn_vit": (CONFIG, ["model.norm=lrn", "model.decoder=vit", "model.decoder_heads=2"]),
    "unet": (CONFIG, ["model.decoder=unet", "data.crop=fixed"]),
    "tokens_pca": (MAE_CONFIG, ["model.encoder_mask_tokens=true", "loss.pca=8", "loss.norm_pix=false"]),
}
TIMM = {"v1", "unet", "tokens_pca"}  # those whose encoder timm has


# The one with most to keep; of the others test_every_variant_is_read says what takes no run.
SLOWLY = [v if v == "bn_pca" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_read(name, tmp_path, pictures):
    """From a file of tensors alone, whatever else they are trained as; and from a wrapped model's."""
    text, own = VARIANTS[name]
    (tmp_path / "c.yaml").write_text(text)
    config = settings.load(Config, tmp_path / "c.yaml", [*own, f"data.source={pictures}", "out=x"])
    check(config)
    state = shake(build_model(config)).state_dict()
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) or k[:6] == "target" for k in state)
    state.pop(next(key for key in state if key.endswith("fc2.bias")))
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="1 missing: "):
        read_checkpoint(tmp_path / "b.pt")


@pytest.fixture(scope="module", params=SLOWLY)
def variant(request, tmp_path_factory, pictures):
    """A run of six steps: its name, the folder of its config and run, and its settings."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    text, own = VARIANTS[name]
    (folder / "config.yaml").write_text(text)
    own = [*own, f"data.source={pictures}", "train.steps=6", "train.batch_size=4", "train.warmup_epochs=0.2"]
    own += ["checkpoint.every=3", "checkpoint.keep_last=9"]
    assert main([str(folder / "config.yaml"), *own, f"out={folder / 'whole'}"]) == 0
    return name, folder, own


def test_cut_at_half_and_resumed_a_run_is_the_same_bit_for_bit(variant):
    _, folder, own = variant
    again = folder / "again"
    shutil.copytree(folder / "whole", again)
    (again / "encoder.safetensors").unlink()
    (again / "checkpoints" / "step_000000006.pt").unlink()
    config = settings.read_yaml(folder / "whole" / "config.yaml") | {"out": str(again)}
    (again / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([str(folder / "config.yaml"), *own, f"out={again}"]) == 0
    assert_same_run(again, folder / "whole")


def test_the_checkpoint_loads_strictly_and_is_described(variant, capsys):
    name, folder, own = variant
    config = settings.load(Config, folder / "config.yaml", [*own, "out=x"])
    model = build_model(config)
    model.load_state_dict(read_checkpoint(folder / "whole"), strict=True)
    assert model.target is None or model.target.fitted
    out = str(folder / "ours.safetensors")
    assert convert([str(folder / "whole"), out, "--to", "fcmae", "--with-decoder", "--force"]) == 0
    said = capsys.readouterr().out
    words = {"v1": "norm none", "ln": "norm ln", "bn_pca": "8 principal components", "lrn_vit": "ViT decoder of 1 x 16"}
    words |= {"unet": "U-Net decoder of 1 x 16", "tokens_pca": "mask tokens in the encoder"}
    assert words[name] in said and "verified  features, predictions" in said
    stored = load_file(out)
    assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())


def test_the_encoder_leaves_for_timm_or_a_line_says_why_not(variant, capsys):
    name, folder, own = variant
    status = convert([str(folder / "whole"), str(folder / f"{name}.safetensors"), "--to", "timm"])
    said = capsys.readouterr()
    exported = load_file(folder / "whole" / "encoder.safetensors")
    assert exported and not [key for key in exported if key.startswith(("encoder.", "target", "mask_token"))]
    if name in TIMM:
        assert status == 0
        made = load_file(folder / f"{name}.safetensors")
        assert made.keys() == exported.keys() and all(torch.equal(made[k], exported[k]) for k in made)
    else:
        norm = own[0].split("=")[1]
        assert status == 2 and said.err.count("\n") == 1 and f"norm {norm} in its blocks" in said.err
        assert "fcmae can" in said.err and not (folder / f"{name}.safetensors").exists()
    again = folder / "init"
    shutil.rmtree(again, ignore_errors=True)
    short = [*own, "train.steps=1", "train.warmup_epochs=0", f"out={again}"]
    assert main([str(folder / "config.yaml"), *short, f"init={folder / 'whole' / 'encoder.safetensors'}"]) == 0
    assert "encoder from" in capsys.readouterr().out


def test_what_cannot_be_held_is_one_line(variant, capsys):
    name, folder, _ = variant
    refused = {
        "v1": [("hf", []), ("dense", []), ("official", []), ("minkowski", [])],
        "ln": [("onnx", []), ("hf", []), ("minkowski", [])],
        "bn_pca": [("exported", []), ("official", ["--with-decoder"])],
        "lrn_vit": [("official", ["--with-decoder"])],
        "unet": [("official", ["--with-decoder"]), ("minkowski", ["--with-decoder"])],
        "tokens_pca": [("official", ["--with-decoder"]), ("hf", ["--with-decoder"])],
    }[name]
    for to, more in refused:
        suffix = {"hf": "", "onnx": ".onnx", "exported": ".pt2"}.get(to, ".safetensors")
        assert convert([str(folder / "whole"), str(folder / f"no{suffix}"), "--to", to, *more]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--to {to} cannot hold" in error and "fcmae" in error, error
        assert not (folder / f"no{suffix}").exists()


def test_init_takes_the_decoder_and_the_basis(variant, capsys):
    """Which is then not fitted again. (From the encoder alone: the test before.)"""
    name, folder, own = variant
    again = folder / "from_whole"
    short = [*own, "train.steps=1", "train.warmup_epochs=0", "train.lr=0"]
    assert main([str(folder / "config.yaml"), *short, f"out={again}", f"init={folder / 'whole'}"]) == 0
    said = capsys.readouterr().out
    assert "encoder and decoder from" in said and "principal components of" not in said
    expected, found = final_state(folder / "whole")["model"], final_state(again)["model"]
    assert all(torch.equal(found[key], value) for key, value in expected.items() if "running_" not in key
               and "tracked" not in key)  # fmt: skip


def test_v1_by_the_printed_command(tmp_path, pictures, capsys):
    (tmp_path / "c.yaml").write_text(CONFIG.replace("depths: [1, 1, 1, 1], dims: [8, 12, 16, 24],", ""))
    short = [f"data.source={pictures}", "train.steps=1", "train.warmup_epochs=0", f"out={tmp_path / 'run'}"]
    assert main([str(tmp_path / "c.yaml"), *short, "model.norm=none"]) == 0
    model = printed_model(capsys.readouterr().out)
    ours = build_model(settings.load(Config, tmp_path / "run" / "config.yaml", []))
    ours.load_state_dict(read_checkpoint(tmp_path / "run"), strict=True)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        close(model.forward_features(x), ours.encode(x), 1e-5)
    short[-1] = f"out={tmp_path / 'bn'}"
    assert main([str(tmp_path / "c.yaml"), *short, "model.norm=bn"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("use it:")]
    assert "timm has no ConvNeXt with norm bn" in line and "init=" in line


def test_a_run_from_before_these_settings_goes_on(tmp_path, pictures, capsys):
    """Its config.yaml and checkpoint lack them; one of them changed is another run."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    out = tmp_path / "run"
    own = [f"data.source={pictures}", "train.steps=4", "train.warmup_epochs=0", "checkpoint.every=2", f"out={out}"]
    assert main([str(tmp_path / "c.yaml"), *own]) == 0

    def without(config: dict) -> dict:
        new = {"model": ("norm", "decoder", "encoder_mask_tokens"), "loss": ("pca",), "data": ("crop", "color_jitter")}
        return config | {
            group: {k: v for k, v in config[group].items() if k not in keys} for group, keys in new.items()
        }

    (out / "config.yaml").write_text(yaml.safe_dump(without(settings.read_yaml(out / "config.yaml"))))
    half = out / "checkpoints" / "step_000000002.pt"
    torch.save({**(payload := torch.load(half, weights_only=True)), "config": without(payload["config"])}, half)
    (out / "checkpoints" / "step_000000004.pt").unlink()
    (out / "encoder.safetensors").unlink()
    assert main([str(tmp_path / "c.yaml"), *own]) == 0
    assert "going on from step 2 of 4" in capsys.readouterr().out
    assert main([str(tmp_path / "c.yaml"), *own, "train.batch_size=4", "train.accum_steps=2"]) == 0
    for change in ("model.norm=ln", "model.decoder=vit", "loss.pca=5", "data.crop=center"):
        assert main([str(tmp_path / "c.yaml"), *own, change]) == 2
        assert change.split("=")[0] in capsys.readouterr().err


def test_batch_norm_s_run_keeps_its_batch(tmp_path, pictures, capsys):
    (tmp_path / "c.yaml").write_text(CONFIG)
    own = [str(tmp_path / "c.yaml"), f"data.source={pictures}", f"out={tmp_path / 'run'}", "model.norm=bn"]
    own += ["train.steps=2", "train.warmup_epochs=0"]
    assert main(own) == 0
    assert main([*own, "train.batch_size=4", "train.accum_steps=2"]) == 2
    assert "train.batch_size: 8 -> 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["data.crop=centre"], ["data.crop=centre", "random, fixed, center"]),
        (["data.color_jitter=0.4", "model.in_chans=5"], ["data.color_jitter=0.4", "1 or 3 channels"]),
        (["data.color_jitter=-1"], ["data.color_jitter=-1.0", "between 0 and 1"]),
        (["model.norm=gn"], ["model.norm=gn", "grn, ln, bn, lrn, none"]),
        (["model.norm=ln", "sparse.grn=batch"], ["sparse.grn=batch", "model.norm=ln"]),
        (["model.decoder=unett"], ["model.decoder 'unett'"]),
        (["loss.pca=5000"], ["loss.pca=5000", "3072"]),
        (["loss.pca=0"], ["loss.pca=0", "1 or more"]),
        (["loss.pca=700"], ["loss.pca=700 needs as many patches", "has 128"]),
        (["model.encoder_mask_tokens=true"], ["model.encoder_mask_tokens=True", "no such setting"]),
        (["model.decoder_heads=4"], ["model.decoder_heads=4", "model.decoder=vit"]),
        (["model.name=mae_vit_tiny_patch16", "model.depths=null", "model.dims=null", "model.decoder=unet"],
         ["model.decoder=unet", "has vit, always"]),
        (["model.name=mae_vit_tiny_patch16", "model.depths=null", "model.dims=null", "model.norm=bn"],
         ["model.norm=bn", "no such setting"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path, pictures, capsys, overrides, words):
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert main([str(tmp_path / "c.yaml"), f"data.source={pictures}", f"out={tmp_path / 'run'}", *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "run").exists()


def test_arms_with_different_components_are_refused(tmp_path, pictures, capsys):
    """A ViT's patches of 16 px and a ConvNet's regions of 32 have other components, however many."""
    (tmp_path / "c.yaml").write_text(
        "arms:\n  a: {model: {name: fcmae_convnextv2_atto, decoder_dim: 16}}\n"
        "  b: {model: {name: mae_vit_tiny_patch16, decoder_dim: 32}}\n"
        "model: {image_size: 64}\ntrain: {batch_size: 8, warmup_epochs: 0}\nbudget: {steps: 1}\ndevice: cpu\n"
    )
    own = [str(tmp_path / "c.yaml"), f"data.source={pictures}", f"out={tmp_path / 'out'}", "loss.pca=8"]
    assert compare(own) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "loss.pca must be the same for all arms" in error, error
    assert "8 components of 32 px of a" in error and "8 components of 16 px of b" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokens_pca", "unet"])
def test_two_ranks_follow_one_process(name, tmp_path, pictures):
    """No parameter goes unused under DDP, and both ranks have the basis that the first one fitted."""
    text, own = VARIANTS[name]
    (tmp_path / "c.yaml").write_text(text)
    own = [*own, f"data.source={pictures}", "train.steps=5", "train.warmup_epochs=0"]
    run(tmp_path / "c.yaml", *own, f"out={tmp_path / 'one'}")
    run(tmp_path / "c.yaml", *own, f"out={tmp_path / 'two'}", "train.batch_size=4", processes=2)
    for a, b in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
