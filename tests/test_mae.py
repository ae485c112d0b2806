"""MAE: the authors' recorded outputs, timm's ViT, masks of any unit, sizes, and what it refuses."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fcmae import MAE, create_model
from fcmae.convert import main as convert
from fcmae.convert import read_checkpoint
from fcmae.kernels.tiles import Tiles
from fcmae.layouts import mae as mae_layout
from fcmae.layouts import timm as timm_layout
from fcmae.loss import spread
from fcmae.masking import mask_from_noise
from fcmae.models import VIT_SIZES
from fcmae.models.vit import positions
from helpers import TOLERANCE, close, golden, masks, section, shake

SMALL = dict(patch_size=8, dim=24, depth=2, heads=3, decoder_dim=16, decoder_depth=1, decoder_heads=2)
PARAMETERS_M = dict(tiny=5.7, small=22, base=86, large=304, huge=632)  # of timm's models with their classifier


def small(dtype=torch.float64, seed=0, **settings):
    return shake(MAE(**{**SMALL, "image_size": (48, 80), **settings}).to(dtype), seed)


def images(batch, channels=3, size=(48, 80), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype)


def outputs(model, x, mask):
    """Loss, prediction, features and every gradient."""
    model.zero_grad()
    loss, pred, _ = model(x, mask)
    loss.backward()
    return [loss, pred, model.encode(x, mask), *(p.grad.clone() for p in model.parameters())]


@pytest.fixture
def recorded(tmp_path):
    """The golden, and the model with its weights through a file such as the authors' script writes."""
    tensors, meta = golden("mae_b2_64px")
    state = section(tensors, "checkpoint.")
    torch.save({"model": state}, tmp_path / "official.pth")
    model = MAE(
        image_size=meta["img"], patch_size=meta["patch"], dim=meta["dim"], depth=meta["depth"], heads=meta["heads"],
        decoder_dim=meta["decoder_dim"], decoder_depth=meta["decoder_depth"], decoder_heads=meta["decoder_heads"],
        mask_ratio=meta["mask_ratio"],
    )  # fmt: skip
    assert torch.equal(model.pos_embed, state["pos_embed"])  # ours, before loading
    assert torch.equal(model.decoder_pos_embed, state["decoder_pos_embed"])
    model.load_state_dict(read_checkpoint(tmp_path / "official.pth"), strict=True)
    mask = mask_from_noise(tensors["noise"].view(2, 4, 4), keep=4)
    assert torch.equal(mask.flatten(1), tensors["mask"].bool())
    return model, tensors, mask


def test_the_authors_outputs_and_gradients(recorded):
    model, tensors, mask = recorded
    loss, pred, used = model(tensors["image"], mask)
    loss.backward()
    assert torch.equal(used, mask)
    close(loss[None], tensors["loss"], 1e-5)
    close(pred, tensors["pred"], 1e-5)
    # Recorded in the order of the noise; ours is that of the image.
    kept = tensors["noise"].argsort(1)[:, :4].argsort(1)
    patches = tensors["latent"][:, 1:].gather(1, kept[..., None].expand(-1, -1, 48))
    close(model.encode(tensors["image"], mask), torch.cat([tensors["latent"][:, :1], patches], 1), 1e-5)
    expected = section(tensors, "grad.")
    assert set(expected) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        close(parameter.grad, expected[name], 1e-4)


def test_round_trip_to_the_authors_layout_is_bit_equal(recorded, tmp_path):
    model, tensors, _ = recorded
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    ours, official = load_file(tmp_path / "ours.safetensors"), section(tensors, "checkpoint.")
    assert ours.keys() == official.keys()
    assert all(ours[key].dtype == official[key].dtype and torch.equal(ours[key], official[key]) for key in official)


def test_the_encoder_in_timms_vit_gives_the_same_features(recorded, tmp_path):
    model, tensors, _ = recorded
    assert convert([str(tmp_path / "official.pth"), str(tmp_path / "encoder.safetensors"), "--to", "timm"]) == 0
    vit = timm.models.VisionTransformer(img_size=64, embed_dim=48, depth=3, num_heads=4, num_classes=0)
    vit.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    with torch.no_grad():
        close(model.encode(tensors["image"]), vit.eval().forward_features(tensors["image"]), 1e-5)


@pytest.mark.parametrize("size", ["tiny", "huge"])
def test_named_sizes_are_timms(size):
    """Strictly, but for the head, with the depth cut to what a test can afford; rectangles and 13 channels."""
    patch = VIT_SIZES[size][0]
    image_size = (4 * patch, 2 * patch)
    settings = dict(image_size=image_size, in_chans=13, depth=1, decoder_dim=16, decoder_depth=1)
    model = shake(create_model(f"mae_vit_{size}_patch{patch}", **settings))
    vit = timm.create_model(
        f"vit_{size}_patch{patch}_224", num_classes=0, depth=1, img_size=image_size, in_chans=13
    ).eval()
    vit.load_state_dict(timm_layout.from_model(model.state_dict()), strict=True)
    x = images(2, 13, image_size, torch.float32)
    with torch.no_grad():
        close(model.encode(x), vit.forward_features(x), 1e-5)
        close(model.encode(x, torch.zeros(2, 4, 2, dtype=torch.bool)), vit.forward_features(x), 1e-5)


@pytest.mark.parametrize("size", VIT_SIZES)
def test_parameter_counts(size):
    patch, dim, *_ = VIT_SIZES[size]
    with torch.device("meta"):
        state = mae_layout.encoder_of(create_model(f"mae_vit_{size}_patch{patch}").state_dict())
        vit = timm.create_model(f"vit_{size}_patch{patch}_224")
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in vit.state_dict().items() if not k.startswith("head")
    }
    ours = sum(v.numel() for v in state.values()) + 1000 * (dim + 1)
    assert abs(ours / 1e6 - PARAMETERS_M[size]) < 0.02 * PARAMETERS_M[size]


def test_a_masked_encoder_is_timms_on_the_visible_patches_alone():
    """By hand, from timm's modules: embed everything, add positions, keep the visible, in ascending order."""
    model, x, mask = small(mask_ratio=0.5), images(2), masks(2, (6, 10), 0.5)
    vit = timm.models.VisionTransformer(
        img_size=(48, 80), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0
    ).double()
    vit.load_state_dict(timm_layout.from_model(model.state_dict()), strict=True)
    tokens = vit.patch_embed(x) + vit.pos_embed[:, 1:]
    for i in range(2):
        visible = tokens[i][~mask[i].flatten()]
        expected = vit.norm(vit.blocks(torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], visible])[None]))
        close(model.encode(x, mask)[i : i + 1], expected, TOLERANCE[torch.float64])


def test_positions_of_a_rectangle_are_those_of_rows_and_columns():
    one, column = positions((3, 5), 16)[0], positions((3, 1), 16)[0, 1:, 8:]
    assert (one[0] == 0).all()
    grid = one[1:].view(3, 5, 16)
    row = positions((1, 5), 16)[0, 1:, :8]
    assert torch.equal(grid[..., :8], row.expand(3, 5, 8)) and torch.equal(
        grid[..., 8:], column[:, None].expand(3, 5, 8)
    )
    angle = torch.arange(5)[:, None] * torch.tensor([1, 0.1, 0.01, 0.001])
    close(row, torch.cat([angle.sin(), angle.cos()], 1), 1e-6)


@pytest.mark.parametrize("times,ratio", [(2, 0.75), (2, 0.4), (1, 0.75)])
def test_a_unit_of_several_patches_is_the_mask_of_its_patches(times, ratio):
    x, mask = images(2), masks(2, (6 // times, 10 // times), ratio)
    one, many = small(), small(mask_unit=8 * times)
    assert torch.equal(many(x, mask)[2], mask)
    for a, b in zip(outputs(many, x, mask), outputs(one, x, spread(mask, times)), strict=True):
        assert torch.equal(a, b)
    assert many.encode(x, mask).shape[1] == 1 + times**2 * int((~mask[0]).sum())


def test_hidden_pixels_are_unseen():
    model, x, mask = small(mask_unit=16), images(2), masks(2, (3, 5))
    hidden = spread(mask, 16)[:, None]
    other = torch.where(hidden, images(2, seed=9), x)
    assert torch.equal(model.encode(other, mask), model.encode(x, mask))
    assert torch.equal(model(other, mask)[1], model(x, mask)[1]) and model(other, mask)[0] != model(x, mask)[0]


def test_a_batch_mate_changes_nothing():
    model, x, mask = small(), images(2), masks(2, (6, 10))
    changed, other_mask = x.clone(), mask.clone()
    changed[1], other_mask[1] = images(1, seed=5)[0], masks(1, (6, 10), seed=7)[0]
    close(model(changed, other_mask)[1][0], model(x, mask)[1][0], TOLERANCE[torch.float64])
    close(model(x[:1], mask[:1])[1], model(x, mask)[1][:1], TOLERANCE[torch.float64])


@pytest.mark.parametrize("channels,size", [(1, (16, 48)), (13, (80, 48)), (3, (32, 32))])
def test_gradients_of_any_channels_and_sizes(channels, size):
    """The derivative along a random direction, by central differences; every parameter takes part."""
    model = small(in_chans=channels, image_size=size, mask_unit=16, mask_ratio=0.5)
    x, mask = images(2, channels, size), masks(2, (size[0] // 16, size[1] // 16), 0.5)
    _, _, _, *grads = outputs(model, x, mask)
    assert all((g != 0).any() for g in grads)
    directions = [torch.randn_like(p) for p in model.parameters()]
    expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    losses = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(model.parameters(), directions, strict=True):
                p += step * d
            losses.append(model(x, mask)[0])
    close(((losses[0] - losses[1]) / 2e-5)[None], expected[None], 1e-5)


def test_initialisation():
    torch.manual_seed(0)
    model = create_model("mae_vit_tiny_patch16")
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif name in ("cls_token", "mask_token"):
            assert 0.015 < p.std() < 0.025, name
        else:
            rows, columns = p.shape[0], p[0].numel()
            bound = (6 / (rows + columns)) ** 0.5
            assert 0.98 * bound < p.abs().max() <= bound and abs(p.mean()) < 0.02 * bound, name


def test_a_drawn_mask_keeps_the_ratio():
    _, _, mask = small(mask_unit=16)(images(4))
    assert mask.shape == (4, 3, 5) and ((~mask).flatten(1).sum(1) == int(15 * 0.25)).all()
    assert len({tuple(m.flatten().tolist()) for m in mask}) > 1


@pytest.mark.parametrize("given", ["nothing", "mask", "tables"])
def test_whole_step_compiles_to_one_graph(given):
    model, x, mask = small(torch.float32, mask_unit=16), images(2, dtype=torch.float32), masks(2, (3, 5), 0.75)
    argument = {"nothing": None, "mask": mask, "tables": Tiles.from_mask(mask, 3)}[given]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    loss, pred, used = compiled(x, argument)
    loss.backward()
    ours = [loss, pred, *(p.grad.clone() for p in model.parameters())]
    expected_loss, expected, _, *grads = outputs(model, x, used)
    for a, b in zip(ours, [expected_loss, expected, *grads], strict=True):
        close(a, b, TOLERANCE[torch.float32])


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_fp32(precision):
    model, x, mask = small(torch.float32), images(2, dtype=torch.float32), masks(2, (6, 10))
    exact = model(x, mask)[1]
    with torch.autocast("cpu", dtype=precision):
        loss, pred, _ = model(x, mask)
    assert loss.dtype == torch.float32
    close(pred, exact, 0.05)


@pytest.mark.parametrize(
    "settings,words",
    [
        (dict(image_size=100), ["height 100", "96 and 104"]),
        (dict(image_size=48, mask_unit=32), ["height 48", "mask unit 32", "32 and 64"]),
        (dict(mask_unit=12), ["mask_unit=12", "patch_size=8"]),
        (dict(mask_unit=4), ["mask_unit=4", "patch_size=8"]),
        (dict(mask_ratio=0.99), ["keeps none of the 60"]),
        (dict(mask_ratio=1.5), ["between 0 and 1"]),
        (dict(norm_window=20), ["norm_window=20"]),
        (dict(dim=26, heads=2), ["dim=26", "multiple of 4"]),
        (dict(dim=24, heads=5), ["dim=24", "heads=5"]),
        (dict(decoder_dim=20, decoder_heads=3), ["decoder_dim=20", "decoder_heads=3"]),
        (dict(heads=0), ["heads=0"]),
        (dict(depth=0), ["depth=0"]),
        (dict(patch_size=0), ["patch_size=0"]),
        (dict(in_chans=0), ["in_chans=0"]),
    ],
)
def test_refused_settings(settings, words):
    with pytest.raises(ValueError) as caught:
        small(**settings)
    assert "\n" not in str(caught.value) and all(w in str(caught.value) for w in words), caught.value


def test_refused_masks_and_images():
    model, x = small(mask_unit=16), images(2)
    uneven = masks(2, (3, 5))
    uneven[0] = True
    uneven[0, 0] = False
    uneven[1, 0], uneven[1, 1:] = True, False
    for mask, words in [
        (uneven, "same number of regions"),
        (torch.ones(2, 3, 5, dtype=torch.bool), "none of the regions"),
        (torch.zeros(2, 3, 5, dtype=torch.bool), "hides none"),
        (masks(2, (6, 10)), r"\(2, 3, 5\)"),
        (masks(2, (3, 5)).float(), "bool"),
        (Tiles.from_mask(masks(2, (6, 10)), 24), r"\(2, 6, 10\); these images need \(2, 3, 5\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(x, mask)
    for wrong, words in [(x[:, :2], "must be"), (x[:, :, :40], "height 40"), (x[:, :, :32], "are 32x80 .* 48x80")]:
        with pytest.raises(ValueError, match=words):
            model.encode(wrong)
