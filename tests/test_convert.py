"""Converting weights: every layout there and back."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from fcmae import create_model
from fcmae.convert import convert, main, read_checkpoint
from fcmae.layouts import LAYOUTS
from fcmae.models import CONVNEXTV2_SIZES
from helpers import close, golden, section, shake
from small_runs import assert_same
from small_weights import AUTHORS, authors_file, small_timm


@pytest.fixture
def authors(tmp_path):
    return authors_file(tmp_path)


def ordered(state):
    return dict(sorted(state.items()))


def pooled(features):
    return torch.nn.functional.layer_norm(features.mean((2, 3)), (features.shape[1],), eps=1e-6)


def auto_backbone(folder, **settings):
    """What AutoBackbone makes of a folder. Its own from_pretrained asks the hub first, even so (transformers 5.23)."""
    from transformers import AutoBackbone

    cls = super(AutoBackbone.__mro__[1], AutoBackbone)
    return cls.from_pretrained(str(folder), output_loading_info=True, **settings)


def test_the_authors_file_becomes_a_timm_model(authors, tmp_path, capsys):
    tensors, _ = golden(AUTHORS)
    count = len(section(tensors, "checkpoint."))
    assert main([str(authors), str(tmp_path / "encoder.safetensors"), "--to", "timm"]) == 0
    report = capsys.readouterr().out
    for words in (
        f"official layout (the authors' FCMAE pretraining), {count} tensors",
        "decoder of 1 x 16",
        "CC BY-NC 4.0",
        f"left out  {count - len(section(tensors, 'checkpoint.encoder.'))}:",
        "\n            decoder.0.dwconv.weight\n",
        "added     2:\n            head.norm.weight (32,)",
        "encoder.stages.0.0.dwconv.kernel (49, 8) -> stages.0.blocks.0.conv_dw.weight (8, 1, 7, 7)",
        "verified  features of 2 random images",
        "written ",
    ):
        assert words in report, (words, report)
    dense = small_timm()
    timm.models.load_checkpoint(dense, str(tmp_path / "encoder.safetensors"), strict=True)
    with torch.no_grad():
        close(dense.eval()(tensors["image"]), tensors["dense_features"], 1e-5)


def test_goldens_through_every_layout_and_back(authors, tmp_path):
    tensors, _ = golden(AUTHORS)
    original = section(tensors, "checkpoint.")
    encoder = {key: x for key, x in original.items() if key.startswith("encoder.")}
    for to in LAYOUTS:
        if to == "hf":
            continue  # writes a folder: below
        convert(authors, tmp_path / f"{to}.pth", to)
        convert(tmp_path / f"{to}.pth", tmp_path / f"{to}-back.safetensors", "official")
        assert_same(ordered(load_file(tmp_path / f"{to}-back.safetensors")), ordered(encoder))
    for to in ("fcmae", "minkowski", "official"):
        convert(authors, tmp_path / f"{to}-whole.safetensors", to, with_decoder=True)
        convert(tmp_path / f"{to}-whole.safetensors", tmp_path / f"{to}-again.pt", "official", with_decoder=True)
        assert_same(ordered(torch.load(tmp_path / f"{to}-again.pt")["model"]), ordered(original))
    dense = section(tensors, "dense.")  # the authors' own densification
    found = torch.load(tmp_path / "dense.pth")["model"]
    assert_same(ordered(found), ordered({key: x for key, x in dense.items() if key in found}))
    assert len(found) == len(encoder)


def test_transformers_loads_what_is_written(authors, tmp_path):
    from transformers import ConvNextV2Model

    tensors, _ = golden(AUTHORS)
    convert(authors, tmp_path / "hf", "hf", image_size=128)
    model, info = ConvNextV2Model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and model.config.image_size == 128
    with torch.no_grad():
        close(model.eval()(tensors["image"]).pooler_output, tensors["dense_features"], 1e-5)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    for wanted in (["stage4"], stages):
        backbone, info = auto_backbone(tmp_path / "hf", out_features=wanted)
        assert not info["missing_keys"]
        with torch.no_grad():
            maps = backbone.eval()(tensors["image"]).feature_maps
        assert [tuple(m.shape[1:]) for m in maps][-1] == (32, 4, 4) and len(maps) == len(wanted)
    convert(tmp_path / "hf", tmp_path / "back.safetensors", "official")
    original = {k: x for k, x in section(tensors, "checkpoint.").items() if k.startswith("encoder.")}
    assert_same(ordered(load_file(tmp_path / "back.safetensors")), ordered(original))


def test_a_classifier_goes_along(tmp_path):
    from transformers import ConvNextV2ForImageClassification, ConvNextV2Model

    model = small_timm(classes=5)
    torch.save({"state_dict": {f"module.{key}": x for key, x in model.state_dict().items()}}, tmp_path / "tuned.pth")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, features = model(images), model.forward_features(images)
    convert(tmp_path / "tuned.pth", tmp_path / "hf", "hf")
    tuned, info = ConvNextV2ForImageClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and tuned.config.num_labels == 5
    with torch.no_grad():
        close(tuned.eval()(images).logits, logits, 1e-5)
    _, info = ConvNextV2Model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    plain, info = auto_backbone(tmp_path / "hf")
    assert not info["missing_keys"]
    with torch.no_grad():
        close(plain.eval()(images).feature_maps[-1], torch.nn.functional.layer_norm(
            features.movedim(1, -1), (32,), eps=1e-6).movedim(-1, 1), 1e-5)  # fmt: skip
    for to, dst in (("dense", "dense.pth"), ("timm", "timm.safetensors")):
        convert(tmp_path / "hf", tmp_path / dst, to)
    again = small_timm(classes=5)
    again.load_state_dict(load_file(tmp_path / "timm.safetensors"), strict=True)
    assert_same(ordered(again.state_dict()), ordered(model.state_dict()))
    assert torch.load(tmp_path / "dense.pth")["model"]["head.weight"].shape == (5, 32)


SIZES = [pytest.param(s, marks=[pytest.mark.slow] if s in ("base", "large", "huge") else []) for s in CONVNEXTV2_SIZES]


@pytest.mark.parametrize("size", SIZES)
def test_every_size_through_timm_transformers_and_the_authors(size):
    from transformers import ConvNextV2Config, ConvNextV2Model

    name = f"convnextv2_{size}"
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0).state_dict()
        depths, dims = CONVNEXTV2_SIZES[size]
        other = ConvNextV2Model(ConvNextV2Config(depths=list(depths), hidden_sizes=list(dims))).state_dict()
    generator = torch.Generator().manual_seed(0)  # one for all: no two tensors are alike
    state = {key: torch.randn(x.shape, generator=generator) for key, x in theirs.items()}
    ours = LAYOUTS["timm"].to_fcmae(state)
    assert_same(LAYOUTS["timm"].from_fcmae(ours), state)
    hf = LAYOUTS["hf"].from_fcmae(ours)
    assert {key: x.shape for key, x in hf.items()} == {key: x.shape for key, x in other.items()}
    assert_same(LAYOUTS["hf"].to_fcmae(hf), ours)
    for layout in ("official", "dense", "minkowski", "fcmae"):
        made = LAYOUTS[layout].from_fcmae(ours)
        assert layout == "fcmae" or "encoder.stages.0.blocks.0.conv_dw.weight" not in made
        assert_same(LAYOUTS[layout].to_fcmae(made), ours)


def test_a_named_size_loads_in_timm_by_name(tmp_path):
    model = shake(create_model("fcmae_convnextv2_atto", image_size=64, decoder_dim=16))
    torch.save(model.state_dict(), tmp_path / "atto.pt")
    convert(tmp_path / "atto.pt", tmp_path / "atto.safetensors")
    dense = timm.create_model("convnextv2_atto", num_classes=0, checkpoint_path=str(tmp_path / "atto.safetensors"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(dense.eval().forward_features(images), model.encode(images), 1e-5)


@pytest.mark.parametrize("mode", ["mean", "repeat", "first"])
@pytest.mark.parametrize("chans", [1, 4, 6])
def test_other_channels_and_back(authors, tmp_path, mode, chans):
    convert(authors, tmp_path / "n.safetensors", "timm", in_chans=chans, stem=mode)
    convert(tmp_path / "n.safetensors", tmp_path / "three.safetensors", "timm", in_chans=3, stem=mode)
    convert(authors, tmp_path / "whole.safetensors", "timm")
    stems = [load_file(tmp_path / f"{name}.safetensors")["stem.0.weight"] for name in ("whole", "n", "three")]
    assert stems[1].shape == (8, chans, 4, 4)
    if mode == "first":
        kept = min(chans, 3)
        assert torch.equal(stems[1][:, :kept], stems[0][:, :kept]) and not stems[1][:, kept:].any()
    else:  # an image that is equal in all channels gives what it gave
        for made in stems[1:] if mode == "mean" else stems[1:2] if chans > 3 else ():
            close(made.sum(1), stems[0].sum(1), 1e-6)
    if mode == "repeat" and chans == 6:
        close(stems[1], stems[0].repeat(1, 2, 1, 1) / 2, 1e-6)
    if mode == "repeat" and chans == 1:
        close(stems[1], 3 * stems[0][:, :1], 1e-6)
    if mode == "mean":
        close(stems[1][:, 0], stems[0].sum(1) / chans, 1e-6)


@pytest.mark.slow
def test_onnx_runs_in_onnxruntime(authors, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    tensors, _ = golden(AUTHORS)
    assert main([str(authors), str(tmp_path / "x.onnx"), "--to", "onnx", "--image-size", "128"]) == 0
    report = capsys.readouterr().out
    assert "verified  features of 1 random images" in report and "verified  features of 3 random images" in report
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    for batch in (1, 3):
        images = tensors["image"].repeat(batch, 1, 1, 1)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        close(pooled(found), tensors["dense_features"].repeat(batch, 1), 1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-799.pth", "x.onnx"]


def test_exported_program(authors, tmp_path):
    tensors, _ = golden(AUTHORS)
    convert(authors, tmp_path / "x.pt2", "exported", image_size=128)
    program = torch.export.load(str(tmp_path / "x.pt2")).module()
    for batch in (1, 3):
        found = program(tensors["image"].repeat(batch, 1, 1, 1))
        close(pooled(found), tensors["dense_features"].repeat(batch, 1), 1e-5)


def test_averaged_weights_and_entries(authors, tmp_path):
    one, two = (shake(small_timm(), seed).state_dict() for seed in (1, 2))
    torch.save({"model": one, "model_ema": two, "epoch": 3}, tmp_path / "both.pth")
    torch.save({"model_ema": two}, tmp_path / "only.pth")
    for source, ema, expected in (("both", False, one), ("both", True, two), ("only", False, two)):
        out = tmp_path / f"{source}{ema}.safetensors"
        convert(tmp_path / f"{source}.pth", out, ema=ema)
        assert_same(load_file(out)["stages.0.blocks.0.conv_dw.weight"], expected["stages.0.blocks.0.conv_dw.weight"])
    with pytest.raises(ValueError, match="no averaged weights"):
        convert(authors, tmp_path / "none.safetensors", ema=True)


def test_read_checkpoint_gives_our_names_and_values(authors):
    tensors, _ = golden(AUTHORS)
    state, dense = read_checkpoint(authors), section(tensors, "dense.")
    assert torch.equal(state["encoder.stages.2.blocks.1.conv_dw.weight"], dense["stages.2.1.dwconv.weight"])
    assert torch.equal(state["encoder.stages.3.downsample.1.weight"], dense["downsample_layers.3.1.weight"])
    assert torch.equal(state["encoder.stages.0.blocks.0.mlp.grn.weight"], dense["stages.0.0.grn.gamma"].flatten())
    assert len(state) == len(section(tensors, "checkpoint."))


def test_whoever_made_a_timm_model_chose_its_mlp(tmp_path):
    model = shake(timm.create_model("convnextv2_atto", conv_mlp=False, num_classes=0))
    torch.save(model.state_dict(), tmp_path / "linear.pth")
    convert(tmp_path / "linear.pth", tmp_path / "atto.safetensors")
    timm.create_model("convnextv2_atto", num_classes=0, checkpoint_path=str(tmp_path / "atto.safetensors"))


def test_a_backbones_folder_and_shards(authors, tmp_path):
    from transformers import ConvNextV2Backbone

    convert(authors, tmp_path / "hf", "hf")
    backbone = ConvNextV2Backbone.from_pretrained(tmp_path / "hf")
    backbone.save_pretrained(tmp_path / "backbone", max_shard_size="50KB")
    assert (tmp_path / "backbone" / "model.safetensors.index.json").is_file()
    convert(tmp_path / "backbone", tmp_path / "back.safetensors", "official")
    convert(authors, tmp_path / "direct.safetensors", "official")
    assert_same(load_file(tmp_path / "back.safetensors"), load_file(tmp_path / "direct.safetensors"))
    (tmp_path / "backbone" / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ValueError, match="no index of weights"):
        read_checkpoint(tmp_path / "backbone")


def test_wrapped_names(tmp_path):
    state = small_timm().state_dict()
    torch.save({f"_orig_mod.module.{key}": x for key, x in state.items()}, tmp_path / "wrapped.pth")
    assert_same(read_checkpoint(tmp_path / "wrapped.pth"), LAYOUTS["timm"].to_fcmae(dict(state)))
    torch.save(dict(state) | {"module.stem.0.weight": state["stem.0.weight"] + 1}, tmp_path / "both.pth")
    with pytest.raises(ValueError, match="1 unknown: module.stem.0.weight"):
        read_checkpoint(tmp_path / "both.pth")
