"""Converting ViTs: every layout there and back, what timm and transformers make of it, what is refused."""

import argparse
import dataclasses

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fcmae import MAE, create_model
from fcmae.convert import convert, main, read_checkpoint
from fcmae.layouts import VIT_LAYOUTS
from fcmae.layouts.hf_vit import HfVitLayout
from helpers import close, golden, section, shake
from small_runs import assert_same

NAME = "mae_b2_64px"
HEADS = dict(heads=4, decoder_heads=4)  # which no tensor of the golden tells


@pytest.fixture
def authors(tmp_path):
    """What the authors' pretraining script writes."""
    tensors, _ = golden(NAME)
    path = tmp_path / "checkpoint-799.pth"
    torch.save({"model": section(tensors, "checkpoint."), "args": argparse.Namespace(mask_ratio=0.75)}, path)
    return path


def ordered(state):
    return dict(sorted(state.items()))


def recorded():
    """The golden's model, whole state and images."""
    tensors, meta = golden(NAME)
    model = MAE(
        image_size=64, dim=48, depth=3, heads=4, decoder_dim=32, decoder_depth=2, decoder_heads=4,
        mask_ratio=meta["mask_ratio"],
    )  # fmt: skip
    model.load_state_dict(section(tensors, "checkpoint."), strict=True)
    return model.eval(), section(tensors, "checkpoint."), tensors


def small_timm(size=(64, 64), **settings):
    """A ViT that timm makes, positions trained."""
    return shake(
        timm.models.VisionTransformer(
            img_size=size, embed_dim=32, depth=2, num_heads=2, **{"num_classes": 0} | settings
        )
    ).eval()


def hf(name, folder, **settings):
    """A model of transformers from a folder, and the keys it lacks."""
    import transformers

    cls = getattr(transformers, name)
    model, info = cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager", **settings)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval(), info["missing_keys"]


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_goldens_through_every_layout_and_back(authors, tmp_path):
    _, whole, _ = recorded()
    encoder = {key: x for key, x in whole.items() if not key.startswith(("decoder_", "mask_token"))}
    for to in VIT_LAYOUTS:
        for with_decoder, expected in ((False, encoder), (True, whole)):
            if with_decoder and to == "timm":
                continue
            name = f"{to}-{with_decoder}" + ("" if to == "hf" else ".pth")
            convert(authors, tmp_path / name, to, with_decoder=with_decoder, **HEADS)
            back = tmp_path / f"{to}-{with_decoder}-back.safetensors"
            convert(tmp_path / name, back, "official", with_decoder=with_decoder)
            assert_same(ordered(load_file(back)), ordered(expected))
            assert_same(ordered(read_checkpoint(tmp_path / name)), ordered(expected))


def test_features_and_predictions_are_the_authors(authors, tmp_path):
    model, _, tensors = recorded()
    images, noise = tensors["image"], tensors["noise"]
    with torch.no_grad():
        features = model.encode(images)
    convert(authors, tmp_path / "encoder.safetensors", "timm")
    vit = timm.models.VisionTransformer(img_size=64, embed_dim=48, depth=3, num_heads=4, num_classes=0)
    timm.models.load_checkpoint(vit, str(tmp_path / "encoder.safetensors"), strict=True)
    convert(authors, tmp_path / "whole", "hf", with_decoder=True, **HEADS)
    convert(authors, tmp_path / "encoder", "hf", **HEADS)
    with torch.no_grad():
        close(vit.eval().forward_features(images), features, 1e-5)
        pretraining, missing = hf("ViTMAEForPreTraining", tmp_path / "whole")
        found = pretraining(images, noise=noise)
        assert not missing and pretraining.config.decoder_num_attention_heads == 4
        close(found.logits, tensors["pred"], 1e-5)
        close(found.loss[None], tensors["loss"], 1e-5)
        masked, missing = hf("ViTMAEModel", tmp_path / "encoder")
        assert not missing
        close(masked(images, noise=noise).last_hidden_state, tensors["latent"], 1e-5)
        plain, missing = hf("ViTModel", tmp_path / "encoder", add_pooling_layer=False)
        assert not missing
        close(plain(images).last_hidden_state, features, 1e-5)
        _, missing = hf("ViTForImageClassification", tmp_path / "encoder")
        assert sorted(missing) == ["classifier.bias", "classifier.weight"]


def test_the_report(authors, tmp_path, capsys):
    whole = recorded()[1]
    options = ["--to", "hf", "--heads", "4", "--decoder-heads", "4"]
    assert main([str(authors), str(tmp_path / "hf"), *options, "--with-decoder"]) == 0
    report = capsys.readouterr().out
    count, split = len(whole), 2 * (3 + 2)
    query, key, value = (f"encoder.layer.2.attention.attention.{x}.weight (48, 48)" for x in ("query", "key", "value"))
    for words in (
        f"official layout (the authors' MAE pretraining), {count} tensors",
        "4 heads, 16 patches of 64 x 64 pixels",
        "the authors' published MAE weights are under CC BY-NC 4.0",
        f"hf layout (transformers' ViT and ViTMAE), {count + 2 * split} tensors",
        f"reshaped  {split}:",
        f"\n            blocks.2.attn.qkv.weight (144, 48) -> {query}, {key}, {value}\n",
        "verified  features, predictions of 2 random images",
    ):
        assert words in report, (words, report)
    assert "left out" not in report and "added" not in report
    assert main([str(tmp_path / "hf"), str(tmp_path / "x.pth")]) == 0
    report, decoder = capsys.readouterr().out, 2 * 16 + 8
    for words in (
        f"left out  {decoder}:\n            decoder.",
        "reshaped  6:",
        f"{key}, {query}, {value} -> blocks.2.attn.qkv.weight (144, 48)",
        "4 heads",
    ):
        assert words in report, (words, report)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_classifier_on_the_class_token_or_the_mean(tmp_path, capsys, pool):
    """timm's and the authors' fine-tuned ViT, whose names are the same, through every layout that can hold it."""
    model = small_timm(num_classes=5, global_pool=pool)
    torch.save({"model": {f"module.{key}": x for key, x in model.state_dict().items()}}, tmp_path / "tuned.pth")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images)
    said = []
    convert(tmp_path / "tuned.pth", tmp_path / "ours.safetensors", "fcmae", say=said.append)
    norm = "norm" if pool == "token" else "fc_norm"
    assert f"{norm}.weight" in load_file(tmp_path / "ours.safetensors")
    assert any("logits" in line and line.startswith("verified") for line in said), said
    assert any("fine-tuned" in line and "CC BY-NC 4.0" in line for line in said), said
    source = tmp_path / "ours.safetensors"
    if pool == "token":
        convert(source, tmp_path / "hf", "hf", heads=2)
        source = tmp_path / "hf"
        tuned, missing = hf("ViTForImageClassification", source)
        assert not missing and tuned.config.num_labels == 5
        with torch.no_grad():
            close(tuned(images).logits, logits, 1e-5)
    else:
        for to, name in (("hf", "hf"), ("official", "x.pth")):
            assert main([str(source), str(tmp_path / name), "--to", to, "--heads", "2"]) == 2
            assert "fc_norm" in (error := one_line(capsys)) and "fcmae, timm can" in error
            assert not (tmp_path / name).exists()
    convert(source, tmp_path / "again.safetensors", "timm")
    again = small_timm(num_classes=5, global_pool=pool)
    again.load_state_dict(load_file(tmp_path / "again.safetensors"), strict=True)
    assert_same(ordered(again.state_dict()), ordered(model.state_dict()))
    convert(tmp_path / "again.safetensors", tmp_path / "x.pt2", "exported", heads=2)
    program = torch.export.load(str(tmp_path / "x.pt2")).module()
    for batch in (1, 3):
        close(program(images[:1].repeat(batch, 1, 1, 1)), logits[:1].repeat(batch, 1), 1e-5)


def test_names_of_transformers_old_and_new(authors, tmp_path):
    """The hub's files; what the installed transformers saves and holds; a pooler, which is left out."""
    from transformers import ViTModel

    whole = recorded()[1]
    convert(authors, tmp_path / "hub", "hf", with_decoder=True, **HEADS)
    assert "decoder.decoder_layers.0.attention.attention.key.bias" in load_file(tmp_path / "hub" / "model.safetensors")
    model, _ = hf("ViTMAEForPreTraining", tmp_path / "hub")
    model.save_pretrained(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "memory.pth")
    for source in ("hub", "saved", "memory.pth", "hub/model.safetensors"):
        assert_same(ordered(read_checkpoint(tmp_path / source)), ordered(whole))
    convert(authors, tmp_path / "encoder", "hf", **HEADS)
    ViTModel.from_pretrained(tmp_path / "encoder").save_pretrained(tmp_path / "pooler")
    said = []
    convert(tmp_path / "pooler", tmp_path / "x.safetensors", say=said.append)
    assert any(line.startswith("ignored   2:") and "pooler.dense.weight" in line for line in said), said


@pytest.mark.parametrize("chans", [1, 4])
def test_other_channels(authors, tmp_path, chans):
    for to, name in (("timm", "x.safetensors"), ("hf", "x")):
        convert(authors, tmp_path / name, to, in_chans=chans, heads=4)
        kernel = read_checkpoint(tmp_path / name)["patch_embed.proj.weight"]
        assert kernel.shape == (48, chans, 16, 16)
        close(kernel.sum(1), recorded()[1]["patch_embed.proj.weight"].sum(1), 1e-5)


@pytest.mark.slow
def test_onnx_runs_in_onnxruntime(authors, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _, tensors = recorded()
    assert main([str(authors), str(tmp_path / "x.onnx"), "--to", "onnx", "--heads", "4"]) == 0
    report = capsys.readouterr().out
    assert "verified  features of 1 random images" in report and "verified  features of 3 random images" in report
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    for batch in (1, 3):
        images = tensors["image"][:1].repeat(batch, 1, 1, 1)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        with torch.no_grad():
            close(found, model.encode(images), 1e-4)


@pytest.mark.parametrize("wrong", ["hf", "official"])
def test_a_result_that_differs_is_not_written(authors, tmp_path, monkeypatch, capsys, wrong):
    """Keys in the place of queries, and a decoder without its mask token: neither changes a name or a shape."""

    class Swapped(HfVitLayout):
        def from_fcmae(self, state):
            made = super().from_fcmae(state)
            one, two = (f"encoder.layer.1.attention.attention.{x}.weight" for x in ("query", "value"))
            return made | {one: made[two], two: made[one]}

    fields = {f.name: getattr(VIT_LAYOUTS["hf"], f.name) for f in dataclasses.fields(VIT_LAYOUTS["hf"])}
    official = dataclasses.replace(VIT_LAYOUTS["official"], theirs=lambda key, x: x * (key != "mask_token"))
    monkeypatch.setitem(VIT_LAYOUTS, wrong, Swapped(**fields) if wrong == "hf" else official)
    arguments = [str(authors), str(tmp_path / ("x" if wrong == "hf" else "x.pth")), "--to", wrong]
    assert main([*arguments, "--with-decoder", "--heads", "4", "--decoder-heads", "4"]) == 2
    assert {"hf": "features differ", "official": "predictions differ"}[wrong] in one_line(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-799.pth"]


def test_refused_in_one_line(authors, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = recorded()[1]
    for name, dropped in (("half", "blocks.1.attn"), ("encoderless", "patch_embed"), ("cut", "decoder_blocks.0.mlp")):
        torch.save({key: x for key, x in whole.items() if not key.startswith(dropped)}, f"{name}.pth")
    torch.save(whole | {"blocks.1.mlp.fc1.weight": torch.zeros(96, 48)}, "mixed.pth")
    torch.save(whole | {"pos_embed": torch.zeros(1, 10, 48)}, "positions.pth")
    save_file(small_timm((32, 96)).state_dict(), "rectangle.safetensors")
    save_file(
        create_model("fcmae_convnextv2_atto", decoder_dim=8, depths=(1, 1, 1, 1)).state_dict(), "conv.safetensors"
    )
    for name in ("hub", "hub4"):
        convert(authors, tmp_path / name, "hf", heads=4)
    state = load_file("hub/model.safetensors")
    torch.save({k: x for k, x in state.items() if k != "encoder.layer.1.attention.attention.key.weight"}, "q.pth")
    (tmp_path / "hub" / "config.json").write_text('{"image_size": 128, "num_attention_heads": 4}')
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments, words in [
        ("half.pth x.pth", "no whole ViT: 4 missing: blocks.1.attn.proj.bias"),
        ("encoderless.pth x.pth", "no whole ViT encoder: 'patch_embed.proj.weight' is not there"),
        ("cut.pth x.pth --to official --with-decoder", "4 missing: decoder_blocks.0.mlp.fc1.bias"),
        ("q.pth x.pth", "missing: blocks.1.attn.qkv.weight; 2 unknown: blocks.1.attn.q.weight"),
        ("mixed.pth x.pth", "blocks.1.mlp.fc1.weight is (96, 48) where (192, 48) belongs"),
        ("positions.pth x.pth", "decoder_pos_embed is (1, 17, 32) where (1, 10, 32) belongs"),
        ("hub x.pth", "128x128 pixels are not its 16 patches of 16"),
        ("checkpoint-799.pth x.pth --to minkowski", "cannot hold a ViT; official, fcmae, timm, hf can"),
        ("checkpoint-799.pth x.pth --to dense", "cannot hold a ViT"),
        ("checkpoint-799.pth x --to hf", "what no tensor tells: --heads N"),
        ("checkpoint-799.pth x.pt2 --to exported", "--heads N"),
        ("checkpoint-799.pth x --to hf --with-decoder --heads 4", "--decoder-heads N"),
        ("checkpoint-799.pth x.pth --heads 5", "48 does not divide into 5 heads"),
        ("checkpoint-799.pth x.pth --image-size 100", "multiple of the mask unit 16"),
        ("checkpoint-799.pth x.pth --image-size 32 32 32", "one number, or height and width"),
        ("checkpoint-799.pth x.pth --to official --with-decoder --image-size 32", "leave out one of"),
        ("checkpoint-799.pth x.pth --in-chans 4 --with-decoder --to official", "without --with-decoder"),
        ("rectangle.safetensors x.pth --image-size 64", "no tensor tells the sides of the 12 patches"),
        ("rectangle.safetensors x.pt2 --to exported --heads 2", "--image-size H W"),
        ("conv.safetensors x.pth --heads 2", "holds a ConvNeXt V2"),
        ("checkpoint-799.pth x.pth --heads 0", "48 does not divide into 0 heads"),
        ("hub4 x.pth --heads 2", "says heads: 4, not 2"),
    ]:
        assert main(arguments.split()) == 2, arguments
        assert words in (error := one_line(capsys)), error
        assert sorted(p.name for p in tmp_path.iterdir()) == before
