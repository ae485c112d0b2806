"""Pretraining a ViT with what FCMAE has: runs, resuming, settings by family, and the same data and targets for both."""

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae import config as settings
from fcmae.convert import main as convert
from fcmae.convert import read_checkpoint
from fcmae.data import SampleStream, make_loader
from fcmae.pretrain import build_dataset, build_model, main
from fcmae.schema import Config
from fcmae.train import checks, optim
from helpers import close, masks
from small_runs import assert_same_run, final_state, make_pictures, metrics, printed_model

CONFIG = """
model: {name: mae_vit_tiny_patch16, image_size: 64, decoder_dim: 32, decoder_depth: 1, decoder_heads: 2}
train: {steps: 20, batch_size: 8, warmup_epochs: 1, lr: 1.0e-3}
checkpoint: {every: 10}
data: {workers: 0}
log: {tensorboard: false, images: 0, print_every: 1}
device: cpu
"""
SMALL = ["model.dim=32", "model.depth=2", "model.heads=2"]
CONVNET = ["model.name=fcmae_convnextv2_atto", "model.decoder_dim=16", "model.decoder_heads=null"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    make_pictures(folder / "pictures")
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def train(place, out, *overrides) -> None:
    """A run in this process."""
    assert main([str(place / "config.yaml"), f"data.source={place / 'pictures'}", f"out={out}", *overrides]) == 0


def configured(place, *overrides) -> Config:
    """The configuration of a run, checked as the command checks it."""
    source = [f"data.source={place / 'pictures'}", "out=x"]
    config = settings.load(Config, place / "config.yaml", [*source, *overrides])
    checks.check(config)
    return config


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run of 20 steps."""
    train(place, place / "whole", *SMALL, "checkpoint.keep_last=9")
    return place / "whole"


def test_cut_at_half_and_resumed_it_is_the_same_bit_for_bit(place, whole, tmp_path):
    half = whole / "checkpoints" / "step_000000010.pt"
    train(place, tmp_path / "again", *SMALL, f"resume={half}", "data.workers=1", "checkpoint.keep_last=9")
    rows = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == b"".join(rows[10:])
    (tmp_path / "again" / "metrics.jsonl").write_bytes(b"".join(rows))
    assert_same_run(tmp_path / "again", whole)


def test_the_loss_falls(place, tmp_path):
    train(place, tmp_path / "run", *SMALL, "train.steps=120", "mask.unit=32", "mask.ratio=0.6")
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_what_a_run_leaves(place, tmp_path, capsys):
    """A real size on rectangles: the encoder goes into timm by the printed command and gives the run's features."""
    out = tmp_path / "a run's folder"
    shape = ["model.image_size=[32,64]", "model.decoder_dim=128"]
    train(place, out, *shape, "train.steps=2", "train.warmup_epochs=0", "log.images=2")
    said = capsys.readouterr().out
    assert "scaled_dot_product_attention" in said and "2 of 2 x 4 = 8 regions of 16 px stay visible" in said
    assert "5.8 M parameters of which the encoder 5.5 M" in said
    vit = printed_model(said)
    checkpoint = next((out / "checkpoints").iterdir())
    model = build_model(configured(place, *shape))
    model.load_state_dict(read_checkpoint(checkpoint), strict=True)
    x = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        close(vit.forward_features(x), model.encode(x), 1e-5)
    assert convert([str(checkpoint), str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == (out / "encoder.safetensors").read_bytes()
    picture = np.asarray(Image.open(next((out / "reconstructions").glob("*.png"))))
    assert picture.std() > 10


def test_the_config_of_a_run_holds_what_null_stood_for(place, tmp_path):
    train(place, tmp_path / "run", *SMALL, "model.decoder_heads=null", "train.steps=1", "train.warmup_epochs=0")
    written = settings.read_yaml(tmp_path / "run" / "config.yaml")
    assert (
        written["model"] | {"patch_size": 16, "dim": 32, "decoder_dim": 32, "decoder_heads": 16, "dims": None}
        == (written["model"])
    )
    assert written["mask"]["ratio"] == 0.75 and final_state(tmp_path / "run")["config"]["mask"]["ratio"] == 0.75
    assert main([str(tmp_path / "run" / "config.yaml")]) == 0  # and such a file goes on with the run


def test_defaults_follow_the_family(place):
    both = ["model.decoder_dim=null", "model.decoder_depth=null", "model.decoder_heads=null"]
    vit = build_model(configured(place, *both))
    convnet = build_model(configured(place, *both, CONVNET[0]))
    assert (vit.mask_ratio, len(vit.decoder_blocks), vit.decoder_embed.out_features) == (0.75, 8, 512)
    assert (convnet.mask_ratio, len(convnet.decoder), convnet.proj.out_features) == (0.6, 1, 512)


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["model.dims=[8,12,16,24]"], ["model.dims=[8, 12, 16, 24]", "no such setting", "model.dim, model.depth"]),
        (["sparse.backend=dense"], ["sparse.backend=dense", "mae_vit_tiny_patch16 has no such setting"]),
        (["sparse.grn=batch"], ["sparse.grn=batch", "mae_vit_tiny_patch16 has no such setting"]),
        ([*CONVNET, "model.depth=3"], ["model.depth=3", "no such setting", "model.depths, model.dims"]),
        ([*CONVNET, "mask.unit=16"], ["mask.unit=16", "fcmae_convnextv2_atto has 32, always"]),
        (["mask.unit=24"], ["mask_unit=24", "multiple of patch_size=16"]),
        (["model.image_size=72"], ["height 72", "mask unit 16"]),
        (["model.heads=5"], ["dim=192", "heads=5"]),
        (["model.name=mae_vit_base_patch14"], ["unknown model", "mae_vit_base_patch16"]),
    ],
)
def test_a_setting_of_the_other_family_is_one_line(place, tmp_path, capsys, overrides, words):
    source = f"data.source={place / 'pictures'}"
    assert main([str(place / "config.yaml"), source, f"out={tmp_path / 'run'}", *overrides]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


def test_weight_decay_spares_what_the_authors_spare(place):
    """Vectors and biases; class and mask token, three-dimensional, decay there and here. Positions are not trained."""
    model = build_model(configured(place))
    optimizer = optim.make_optimizer(model, configured(place).train, torch.device("cpu"))
    decayed = {n: g["weight_decay"] for g in optimizer.state_dict()["param_groups"] for n in g["param_names"]}
    assert set(decayed) == {name for name, _ in model.named_parameters()}
    for name, decay in decayed.items():
        assert "pos_embed" not in name
        assert decay == (0 if name.endswith("bias") or "norm" in name else 0.05), name
    assert decayed["cls_token"] == decayed["mask_token"] == 0.05


@pytest.mark.parametrize("strategy", ["random", "block", "grid"])
def test_both_families_see_the_same_crops_and_masks(place, strategy):
    """Batches of two epochs; the ConvNet's with another worker count and a run that starts in the middle."""
    common = ["mask.unit=32", "mask.ratio=0.6", f"mask.strategy={strategy}", "model.image_size=[64,96]", "seed=3"]
    batches = {}
    for family, workers, start in (([], 0, 0), (CONVNET, 2, 4)):
        config = configured(place, *common, *family)
        dataset = build_dataset(config, build_model(config))
        stream = SampleStream(
            len(dataset), batch_size=8, accum_steps=1, rank=0, world_size=1, seed=config.seed, start_step=start,
            end_step=10,
        )  # fmt: skip
        batches[start] = list(make_loader(dataset, stream, workers, 2, pin_memory=False))
    assert len(batches[0]) == 10 and len(batches[4]) == 6
    for vit, convnet in zip(batches[0][4:], batches[4], strict=True):
        for key in ("image", "mask", "index"):
            assert torch.equal(vit[key], convnet[key]), key
        assert vit["mask"].shape == (8, 2, 3) and ((~vit["mask"]).flatten(1).sum(1) == 2).all()
    assert not torch.equal(batches[0][0]["image"], batches[0][5]["image"])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_both_losses_are_against_the_same_numbers(place, norm_pix):
    """With zero predictions a loss is the mean square of its targets; without the shared window they differ."""
    common = ["mask.unit=32", "model.image_size=[64,96]", "mask.ratio=0.6", f"loss.norm_pix={norm_pix}"]
    images, mask = torch.randn(2, 3, 64, 96).cumsum(-1), masks(2, (2, 3))
    found = {}
    for window in ("32", "null"):
        for family in ([], CONVNET):
            model = build_model(configured(place, *common, *family, f"loss.norm_window={window}"))
            last = model.pred if family else model.decoder_pred
            torch.nn.init.zeros_(last.weight)
            found[window, len(family)] = model(images, mask)[0].detach()
    close(found["32", 0][None], found["32", len(CONVNET)][None], 1e-6)
    assert norm_pix == (abs(found["null", 0] - found["null", len(CONVNET)]) > 1e-4)
