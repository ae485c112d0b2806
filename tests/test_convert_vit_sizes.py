"""ViTs of every size and of other image sizes: through the layouts, and as what a run starts from."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification

from fcmae import create_model
from fcmae.convert import convert, main, read_checkpoint
from fcmae.layouts import VIT_LAYOUTS
from fcmae.layouts.positions import resampled
from fcmae.models import VIT_SIZES
from fcmae.models.mae import positions
from fcmae.pretrain import main as pretrain
from helpers import close, golden, section, shake
from small_runs import make_pictures

SMALL = dict(embed_dim=32, depth=2, num_heads=2)
CONFIG = """
model: {name: mae_vit_tiny_patch16, image_size: 64, dim: 32, depth: 2, heads: 2, decoder_dim: 32, decoder_depth: 1,
        decoder_heads: 2}
train: {steps: 1, batch_size: 8, warmup_epochs: 0, lr: 0, weight_decay: 0}
data: {workers: 0}
log: {tensorboard: false, images: 0}
device: cpu
"""


def small_timm(size, **settings):
    """A ViT that timm makes, positions trained."""
    return shake(timm.models.VisionTransformer(img_size=size, **SMALL, **{"num_classes": 0} | settings)).eval()


def images(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def meta_model(name, config, **settings):
    import transformers

    with torch.device("meta"):
        return getattr(transformers, name)(config, **settings).state_dict()


@pytest.mark.parametrize("size", VIT_SIZES)
def test_every_size_by_keys_and_shapes(size):
    """On the meta device, against timm's and transformers' own models, whose keys in memory are not those of files."""
    from transformers import ViTConfig, ViTMAEConfig

    patch, dim, depth, heads = VIT_SIZES[size]
    with torch.device("meta"):
        ours = create_model(f"mae_vit_{size}_patch{patch}").state_dict()
        vit = timm.create_model(f"vit_{size}_patch{patch}_224", num_classes=7).state_dict()
    sizes = dict(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * dim, patch_size=patch
    )
    hf_layout = VIT_LAYOUTS["hf"]
    classifier = meta_model("ViTForImageClassification", ViTConfig(**sizes, num_labels=7))
    for layout, theirs, expected in (
        (hf_layout, meta_model("ViTMAEForPreTraining", ViTMAEConfig(**sizes)), ours),
        (hf_layout, classifier, vit),
        (VIT_LAYOUTS["timm"], vit, vit),
        (VIT_LAYOUTS["official"], ours, ours),
    ):
        state = {key.removeprefix("vit."): x for key, x in theirs.items()}
        assert layout.recognises(layout.from_fcmae(expected))
        read = layout.to_fcmae(state)
        again = layout.to_fcmae(layout.from_fcmae(read))
        for made in (read, again):
            assert {key: x.shape for key, x in made.items()} == {key: x.shape for key, x in expected.items()}


def test_tiny_loads_in_timm_by_name(tmp_path):
    model = shake(create_model("mae_vit_tiny_patch16", decoder_dim=32, decoder_depth=1)).eval()
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    convert(tmp_path / "tiny.pt", tmp_path / "tiny.safetensors")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "tiny.safetensors"))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        close(vit.eval().forward_features(images), model.encode(images), 1e-5)


@pytest.mark.parametrize("new", [(96, 96), (32, 96)])
def test_positions_for_another_size(tmp_path, new):
    """Against timm itself: its model of the new size loads the source by its own filter, which resamples."""
    source, said = small_timm((64, 64), num_classes=5), []
    torch.save(source.state_dict(), tmp_path / "old.pth")
    convert(tmp_path / "old.pth", tmp_path / "new.safetensors", image_size=new, heads=2, say=said.append)
    verified = [line for line in said if line.startswith("verified  features, logits")]
    assert [f"of {h} x {w} differ" in line for (h, w), line in zip(((64, 64), new), verified, strict=True)] == [
        True
    ] * 2
    assert any("pos_embed (1, 17, 32) -> pos_embed" in line for line in said)
    moved, theirs = small_timm(new, num_classes=5), small_timm(new, num_classes=5)
    moved.load_state_dict(load_file(tmp_path / "new.safetensors"), strict=True)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(source.state_dict(), theirs)
    theirs.load_state_dict(filtered, strict=True)
    convert(tmp_path / "old.pth", tmp_path / "hf", "hf", image_size=new, heads=2)
    tuned = ViTForImageClassification.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        expected = theirs(images(*new))
        close(moved(images(*new)), expected, 1e-5)
        close(tuned.eval()(images(*new)).logits, expected, 1e-5)


def test_positions_resampled_wrongly_are_refused(tmp_path, monkeypatch, capsys):
    torch.save(small_timm((64, 64)).state_dict(), tmp_path / "old.pth")
    monkeypatch.setattr("fcmae.resizing.resampled", lambda x, old, new: resampled(x, old, new[::-1]))
    assert main([str(tmp_path / "old.pth"), str(tmp_path / "new.pth"), "--image-size", "32", "96"]) == 2
    assert "features differ" in capsys.readouterr().err and not (tmp_path / "new.pth").exists()


def test_the_sides_of_a_rectangle(tmp_path):
    """Fixed positions show them, of trained ones they are named."""
    standing = shake(create_model("mae_vit_tiny_patch16", image_size=(64, 32), decoder_dim=32, decoder_depth=1)).eval()
    torch.save(standing.state_dict(), tmp_path / "fixed.pth")
    trained = small_timm((96, 32))
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    convert(tmp_path / "fixed.pth", tmp_path / "fixed.safetensors")
    convert(tmp_path / "fixed.safetensors", tmp_path / "fixed.pt2", "exported")
    convert(tmp_path / "trained.pth", tmp_path / "trained.pt2", "exported", image_size=(96, 32), heads=2)
    for name, size, run in (("fixed", (64, 32), standing.encode), ("trained", (96, 32), trained.forward_features)):
        program = torch.export.load(str(tmp_path / f"{name}.pt2")).module()
        with torch.no_grad():
            close(program(images(*size)), run(images(*size)), 1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    make_pictures(folder / "pictures", 16)
    (folder / "config.yaml").write_text(CONFIG)
    assert start(folder, folder / "first", "train.lr=1.0e-3") == 0
    return folder


def start(place, out, *settings):
    return pretrain([str(place / "config.yaml"), f"data.source={place}/pictures", f"out={out}", *settings])


@pytest.mark.parametrize("to,name", [("timm", "x.safetensors"), ("hf", "x"), ("official", "x.pth")])
def test_a_run_starts_from_any_layout(place, tmp_path, capsys, to, name):
    """With no learning rate the weights stay what they began as."""
    convert(place / "first", tmp_path / name, to, with_decoder=to != "timm")
    assert start(place, tmp_path / "run", f"init={tmp_path}/{name}") == 0
    said = capsys.readouterr().out
    alone = "encoder from {}; the decoder starts anew, there is none"
    assert (alone if to == "timm" else "encoder and decoder from {}").format(tmp_path / name) in said
    one, two = read_checkpoint(tmp_path / "run"), read_checkpoint(place / "first")
    assert all(torch.equal(one[key], two[key]) for key in two if to != "timm" or key in load_file(tmp_path / name))
    assert to != "timm" or not torch.equal(one["decoder_embed.weight"], two["decoder_embed.weight"])


def test_a_run_of_the_authors_file_at_another_size(place, tmp_path, capsys):
    """Positions are the model's own: fixed ones of its size; the decoder goes along."""
    tensors, _ = golden("mae_b2_64px")
    state = section(tensors, "checkpoint.")
    torch.save({"model": state}, tmp_path / "authors.pth")
    settings = ["model.dim=48", "model.depth=3", "model.heads=4", "model.decoder_depth=2", "model.decoder_heads=4"]
    arguments = [f"init={tmp_path}/authors.pth", *settings, "model.image_size=[32,96]"]
    assert start(place, tmp_path / "run", *arguments) == 0
    assert "encoder and decoder from" in (said := capsys.readouterr().out)
    assert "with the model's own fixed positions for 32 x 96 pixels" in said
    found = read_checkpoint(tmp_path / "run")
    for key, x in state.items():
        if key.endswith("pos_embed"):
            assert torch.equal(found[key], positions((2, 6), x.shape[2]))
        else:
            assert torch.equal(found[key], x), key


@pytest.mark.parametrize("size", [64, 96])
def test_a_run_of_trained_positions(place, tmp_path, capsys, size):
    """They are what the encoder learned to read: taken, at another size resampled as timm does."""
    vit = small_timm((64, 64), num_classes=5, global_pool="avg")
    save_file(vit.state_dict(), tmp_path / "tuned.safetensors")
    assert start(place, tmp_path / "run", f"init={tmp_path}/tuned.safetensors", f"model.image_size={size}") == 0
    said = capsys.readouterr().out
    assert "its last norm starts anew" in said
    assert ("with the positions it was trained with" if size == 64 else "resampled for 96 x 96 pixels") in said
    vit.set_input_size(img_size=(size, size))
    found = read_checkpoint(tmp_path / "run")
    for key, x in vit.state_dict().items():
        assert key.startswith(("head", "fc_norm")) or torch.equal(found[key], x), key


def test_what_a_run_refuses(place, tmp_path, capsys):
    conv = create_model("fcmae_convnextv2_atto", decoder_dim=8, depths=(1, 1, 1, 1), dims=(8, 12, 16, 24))
    torch.save(conv.state_dict(), tmp_path / "conv.pth")
    torch.save(small_timm((32, 96)).state_dict(), tmp_path / "rectangle.pth")
    convert(place / "first", tmp_path / "hf", "hf")
    convnet = ["model.name=fcmae_convnextv2_atto", "model.decoder_heads=null", "model.dim=null", "model.heads=null"]
    for settings, words in [
        ([f"init={tmp_path}/conv.pth"], "holds ConvNeXt V2 of depths"),
        ([f"init={place}/first", *convnet, "model.depth=null"], "holds ViT of width 32"),
        ([f"init={place}/first", "model.depth=3"], "set model.name, or what is under model."),
        ([f"init={place}/first", "model.in_chans=4"], "--in-chans 4"),
        ([f"init={place}/first", "model.heads=4"], "has 2 heads of attention, the model 4"),
        ([f"init={tmp_path}/hf", "model.heads=4"], "has 2 heads of attention, the model 4"),
        ([f"init={tmp_path}/rectangle.pth"], "no tensor tells the sides of the 12 patches"),
    ]:
        assert start(place, tmp_path / "run", *settings) == 2, settings
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()
