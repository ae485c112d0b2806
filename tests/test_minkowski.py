"""The MinkowskiEngine backend: the same numbers as the reference, in the authors' layout, through a whole run."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from fcmae import FCMAE
from fcmae.convert import main as convert
from fcmae.convert import read_checkpoint
from fcmae.layouts import LAYOUTS
from fcmae.minkowski import engine
from fcmae.pretrain import main as pretrain
from helpers import TOLERANCE, close, golden, masks, section, shake
from small_runs import CONFIG, assert_same, assert_same_run, final_state, make_pictures, metrics, run

if importlib.util.find_spec("MinkowskiEngine") is None:
    pytest.skip(f"needs MinkowskiEngine: {engine.BUILD}", allow_module_level=True)

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "decoder_dim": 16}


def pair(dtype=torch.float32, **settings):
    """A reference model and the same weights in MinkowskiEngine's modules."""
    reference = shake(FCMAE(**SMALL, **settings, backend="reference")).to(dtype)
    model = FCMAE(**SMALL, **settings, backend="minkowski").to(dtype)
    model.load_state_dict(reference.state_dict(), strict=True)
    return reference, model


def ordered(state):
    return dict(sorted(state.items()))


def gradients(model):
    return LAYOUTS["minkowski"].to_fcmae({name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grn", ["per_image", "batch"])
@pytest.mark.parametrize("size,in_chans,batch", [((96, 96), 3, 3), ((64, 160), 1, 2), ((128, 96), 5, 1)])
def test_equals_the_reference(size, in_chans, batch, grn, dtype):
    reference, model = pair(dtype, image_size=size, in_chans=in_chans, grn=grn)
    images = torch.randn(batch, in_chans, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for seed in range(3):
        mask = masks(batch, (size[0] // 32, size[1] // 32), seed=seed)
        for m in (reference, model):
            m.zero_grad()
            m(images, mask)[0].backward()
        close(model.encode(images, mask), reference.encode(images, mask), TOLERANCE[dtype])
        close(model(images, mask)[0][None], reference(images, mask)[0][None], max(TOLERANCE[dtype], 1e-6))
        expected, found = gradients(reference), gradients(model)
        assert set(found) == set(expected)
        for name, gradient in found.items():
            close(gradient, expected[name], TOLERANCE[dtype])
    close(model.encode(images), reference.encode(images), TOLERANCE[dtype])


def test_a_decoder_of_vit_blocks_and_components_go_with_it():
    size = {"image_size": (96, 64), "decoder": "vit", "decoder_heads": 4, "pca": 5}
    reference, model = pair(torch.float64, **size)
    for m in (reference, model):
        m.target.set(torch.zeros(3072), torch.eye(3072)[:5])
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = masks(2, (3, 2))
    close(model(images, mask)[1], reference(images, mask)[1], TOLERANCE[torch.float64])
    assert LAYOUTS["minkowski"].to_fcmae(model.state_dict()).keys() == reference.state_dict().keys()


def test_the_map_has_the_full_grid():
    _, model = pair(image_size=128)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[:, 1, 1:3] = False  # the border is wholly masked
    images = torch.zeros(2, 3, 128, 128)  # and so is what a coordinate taken from activations would need
    features = model.encode(images, mask)
    assert features.shape == (2, 24, 4, 4)
    assert torch.equal((features != 0).any(1), ~mask)


CASES = [("fcmae_b1_128px", "per_image"), ("fcmae_b1_128px", "batch"), ("fcmae_b3_96px", "batch")]


@pytest.mark.parametrize("name,grn", CASES)
def test_goldens_in_their_own_layout(name, grn):
    tensors, meta = golden(name)
    state = section(tensors, "checkpoint.")
    model = FCMAE(
        image_size=meta["img"], depths=meta["depths"], dims=meta["dims"], decoder_dim=meta["decoder_dim"],
        decoder_depth=meta["decoder_depth"], mask_ratio=meta["mask_ratio"], grn=grn, backend="minkowski",
    )  # fmt: skip
    model.load_state_dict(state, strict=True)
    assert_same(ordered(section(state, "encoder.")), ordered(model.encoder.state_dict()))
    model.encoder.load_state_dict(section(state, "encoder."), strict=True)
    side = meta["img"] // 32
    mask = tensors["mask"].view(-1, side, side).bool()
    loss, pred, _ = model(tensors["image"], mask)
    loss.backward()
    close(loss[None], tensors["loss"], 1e-5)
    close(pred, tensors["pred"].flatten(2).transpose(1, 2), 1e-5)
    close(model.encode(tensors["image"], mask), tensors["encoder_out"], 1e-5)
    for key, gradient in LAYOUTS["official"].to_fcmae(section(tensors, "grad.")).items():
        close(gradients(model)[key], gradient, 1e-4)
    for key, parameter in model.encoder.named_parameters():
        assert parameter.grad.shape == tensors[f"grad.encoder.{key}"].shape


def test_initial_weights_do_not_depend_on_the_backend():
    models, following = [], []
    for backend in ("native", "minkowski"):
        torch.manual_seed(0)
        models.append(FCMAE(**SMALL, image_size=64, backend=backend))
        following.append(torch.rand(3))
    assert_same(ordered(LAYOUTS["minkowski"].to_fcmae(models[1].state_dict())), ordered(models[0].state_dict()))
    assert torch.equal(*following)


def test_refusals():
    _, model = pair(image_size=64)
    images, mask = torch.zeros(1, 3, 64, 64), masks(1, (2, 2))
    with pytest.raises(ValueError, match="bfloat16.*train.precision=fp32"), torch.autocast("cpu", torch.bfloat16):
        model(images, mask)
    with pytest.raises(ValueError, match="float16"):
        model.half()(images.half(), mask)
    if not engine.load().is_cuda_available():
        with pytest.raises(ValueError, match="for the CPU alone.*make minkowski"):
            engine.check_device(torch.device("cuda"))
    with pytest.raises(ValueError, match="CPU and CUDA code only"):
        engine.check_device(torch.device("mps"))


def test_the_forks_depthwise_is_taken_where_there_is_one(monkeypatch):
    me = engine.load()

    class Depthwise(me.MinkowskiChannelwiseConvolution):
        pass

    monkeypatch.setattr(me, "MinkowskiDepthwiseConvolution", Depthwise, raising=False)
    _, model = pair(image_size=64)
    assert all(isinstance(stage[0].dwconv, Depthwise) for stage in model.encoder.stages)
    assert "its own depthwise" in engine.describe()
    with pytest.raises(ValueError, match="has CUDA code only"):
        model(torch.zeros(1, 3, 64, 64), masks(1, (2, 2)))


@pytest.mark.parametrize(
    "setting,words", [("train.precision=bf16", "bfloat16"), ("train.compile=true", "cannot be compiled")]
)
def test_refused_before_anything_is_written(place, tmp_path, capsys, setting, words):
    arguments = [f"data.source={place}/pictures", f"out={tmp_path}/run", "sparse.backend=minkowski", setting]
    assert pretrain([str(place / "config.yaml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minkowski")
    make_pictures(folder / "pictures", 24)
    (folder / "config.yaml").write_text(CONFIG + f"checkpoint: {{every: 5, keep_last: 9}}\nout: {folder}/unset\n")
    return folder


def train(place, out, *settings):
    return run(place / "config.yaml", f"data.source={place}/pictures", f"out={out}", "train.steps=10", *settings)


def test_a_run(place):
    done = train(place, place / "me", "sparse.backend=minkowski")
    assert "backend  minkowski: MinkowskiEngine 0.5.4" in done.stdout
    train(place, place / "native")
    one, two = (torch.tensor([row["loss"] for row in metrics(place / name)]) for name in ("me", "native"))
    close(one, two, 1e-4)

    saved = final_state(place / "me")["model"]
    assert saved["encoder.stages.0.0.dwconv.kernel"].shape == (49, 8)
    model = FCMAE(image_size=64, depths=(1, 1, 1, 1), dims=SMALL["dims"], decoder_dim=16, backend="minkowski")
    model.load_state_dict(saved, strict=True)
    import timm

    dense = timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=SMALL["dims"], use_grn=True, ls_init_value=None)
    dense.reset_classifier(0)
    dense.load_state_dict(load_file(place / "me" / "encoder.safetensors"), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    close(model.encode(images), dense.forward_features(images), 1e-5)

    # Decay is for the same parameters as elsewhere: MinkowskiEngine's GRN and biases are (1, C).
    groups = [final_state(place / name)["optimizer"]["param_groups"] for name in ("me", "native")]
    names = [[{LAYOUTS["minkowski"].names.ours(n) or n for n in g["param_names"]} for g in both] for both in groups]
    assert names[0] == names[1]


@pytest.mark.slow
def test_a_run_changes_its_backend_and_back_through_convert_exactly(place):
    train(place, place / "whole", "sparse.backend=minkowski")
    half = place / "whole" / "checkpoints" / "step_000000005.pt"
    assert convert([str(half), str(place / "native.pt"), "--to", "fcmae"]) == 0
    assert convert([str(place / "native.pt"), str(place / "back.pt"), "--to", "minkowski"]) == 0
    there, back = (torch.load(path, weights_only=True) for path in (place / "native.pt", place / "back.pt"))
    assert_same(torch.load(half, weights_only=True), back)
    assert there["model"]["encoder.stages.0.blocks.0.conv_dw.weight"].shape == (8, 1, 7, 7)

    # Going on from what came back, or from the native one without a word of it, is the run that was never left.
    for name in ("back", "native"):
        train(place, place / f"from_{name}", "sparse.backend=minkowski", f"resume={place}/{name}.pt")
        one, two = final_state(place / "whole"), final_state(place / f"from_{name}")
        for part in ("model", "optimizer", "rng"):
            assert_same(one[part], two[part], part)
    train(place, place / "on_native", f"resume={half}")
    one, two = (torch.tensor([row["loss"] for row in metrics(place / n)]) for n in ("on_native", "whole"))
    close(one, two[5:], 1e-4)


@pytest.mark.slow
def test_runs_repeat_bit_for_bit(place):
    for name in ("a", "b"):
        train(place, place / name, "sparse.backend=minkowski")
    assert_same_run(place / "a", place / "b")


def test_read_checkpoint_takes_its_checkpoints(place, tmp_path):
    _, model = pair(image_size=64)
    torch.save(model.state_dict(), tmp_path / "me.pt")
    FCMAE(**SMALL, image_size=64).load_state_dict(read_checkpoint(tmp_path / "me.pt"), strict=True)
