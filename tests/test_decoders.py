"""FCMAE's decoders: ViT and U-Net against compositions by hand, on every backend, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from fcmae import FCMAE
from fcmae.loss import patchify
from fcmae.models.support import BACKENDS, DenseSupport
from fcmae.models.vit import positions
from helpers import TOLERANCE, close, masks, shake

SMALL = dict(image_size=(96, 128), depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), decoder_dim=32, decoder_heads=None)
VIT = dict(decoder="vit", decoder_heads=4, decoder_depth=2)
UNET = dict(decoder="unet")


def small(backend="reference", dtype=torch.float64, **settings):
    return shake(FCMAE(**{**SMALL, "backend": backend, **settings}).to(dtype))


def images(batch, size=(96, 128), dtype=torch.float64, seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("settings", [VIT, UNET, dict(decoder="unet", norm="bn", decoder_depth=2)])
@pytest.mark.parametrize("backend,dtype", [("dense", torch.float64), ("native", torch.float32)])
def test_every_backend_is_the_reference(settings, backend, dtype):
    """Loss, prediction and every gradient, and there is one for every parameter."""
    x, mask, found = images(2, dtype=dtype), masks(2, (3, 4)), {}
    for each in (backend, "reference"):
        model = small(each, dtype, **settings)
        loss, pred, _ = model(x, mask)
        loss.backward()
        assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())
        found[each] = [loss, pred, *(p.grad for p in model.parameters())]
    for a, b in zip(*found.values(), strict=True):
        close(a, b, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("settings", [VIT, UNET])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_pixels_move_nothing(settings, backend):
    model, x, mask = small(backend, torch.float32, **settings), images(2, dtype=torch.float32), masks(2, (3, 4))
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    other = torch.where(hidden, images(2, dtype=torch.float32, seed=9), x)
    assert torch.equal(model(other, mask)[1], model(x, mask)[1])
    changed = torch.where(hidden, x, images(2, dtype=torch.float32, seed=9))
    assert not torch.equal(model(changed, mask)[1], model(x, mask)[1])


def test_vit_by_hand():
    model, x, mask = small(**VIT), images(2), masks(2, (3, 4))
    tokens = model.proj(model.encode(x, mask).flatten(2).transpose(1, 2))
    tokens[mask.flatten(1)] = model.mask_token.flatten()
    tokens = tokens + positions((3, 4), 32)[0, 1:].double()
    for block in model.decoder:
        assert block.attn.num_heads == 4
        a = F.layer_norm(tokens, (32,), block.norm1.weight, block.norm1.bias, eps=1e-6)
        q, k, v = block.attn.qkv(a).view(2, 12, 3, 4, 8).permute(2, 0, 3, 1, 4)
        a = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        tokens = tokens + block.attn.proj(a.transpose(1, 2).flatten(2))
        a = F.layer_norm(tokens, (32,), block.norm2.weight, block.norm2.bias, eps=1e-6)
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(a)))
    norm = model.decoder_norm
    expected = model.pred(F.layer_norm(tokens, (32,), norm.weight, norm.bias, eps=1e-6))
    close(model(x, mask)[1], expected, TOLERANCE[torch.float64])
    assert FCMAE(**{**SMALL, "decoder": "vit"}).decoder[0].attn.num_heads == 16


@pytest.mark.parametrize("channels", [1, 3])
def test_unet_by_hand(channels):
    """The same weights as 1x1 and transposed convolutions, of masks at each resolution, to an image of pixels."""
    model, mask = small(**UNET, in_chans=channels), masks(2, (3, 4))
    x = images(2, channels=channels)
    hidden = mask[:, None].double()
    maps = model.encoder.maps(x, BACKENDS["reference"](model.tiles(x, mask)))
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 32, 8), (12, 16, 12), (6, 8, 16), (3, 4, 24)]
    assert [m.shape[-1] for m in (model.mask_token[i] for i in range(4))] == [32, 16, 8, 8]
    below = None
    for level in range(4):
        feature = maps[3 - level].permute(0, 3, 1, 2)
        m = F.interpolate(hidden, scale_factor=2**level, mode="nearest")
        assert (feature * m == 0).all()
        y = F.conv2d(feature, model.proj[level].weight[..., None, None], model.proj[level].bias)
        y = y * (1 - m) + model.mask_token[level].permute(0, 3, 1, 2) * m
        if below is not None:
            up = model.up[level - 1]
            weight = up.weight.view(2, 2, -1, below.shape[1]).permute(3, 2, 0, 1)
            bias = up.bias.view(2, 2, -1).permute(2, 0, 1).repeat(1, y.shape[2] // 2, y.shape[3] // 2)
            y = y + F.conv_transpose2d(below, weight, stride=2) + bias
        for block in model.decoder[level]:
            y = block(y.permute(0, 2, 3, 1), DenseSupport()).permute(0, 3, 1, 2)
        below = y
    weight = model.pred.weight.view(4, 4, channels, -1).permute(3, 2, 0, 1)
    bias = model.pred.bias.view(4, 4, channels).permute(2, 0, 1).repeat(1, 24, 32)
    picture = F.conv_transpose2d(below, weight, stride=4) + bias
    close(model(x, mask)[1], patchify(picture, 32), TOLERANCE[torch.float64])


@pytest.mark.parametrize("decoder", ["convnext", "vit", "unet"])
def test_principal_components_of_every_decoder(decoder):
    """One prediction of k numbers a region, every parameter in use, also of the U-Net."""
    model = small(decoder=decoder, pca=5)
    model.target.set(torch.zeros(3072), torch.eye(3072)[:5])
    loss, pred, _ = model(images(2), masks(2, (3, 4)))
    loss.backward()
    assert pred.shape == (2, 12, 5) and all((p.grad != 0).any() for p in model.parameters())


def test_the_default_keeps_its_names():
    keys = set(small().state_dict()) - {f"encoder.{key}" for key in small().encoder.state_dict()}
    block = ("conv_dw", "norm", "mlp.fc1", "mlp.grn", "mlp.fc2")
    modules = ["proj", *(f"decoder.0.{name}" for name in block), "pred"]
    assert keys == {"mask_token", *(f"{module}.{p}" for module in modules for p in ("weight", "bias"))}
    assert small().state_dict().keys() == small(decoder="convnext", norm="grn").state_dict().keys()


def test_sizes():
    small(**UNET, decoder_depth=0)(images(1), masks(1, (3, 4)))
    assert [m.shape[-1] for m in small(**{**UNET, "decoder_dim": 12}).mask_token] == [12, 8, 8, 8]
    other = images(2, (64, 160))
    small(**UNET)(other, masks(2, (2, 5)))
    with pytest.raises(ValueError, match="are 64x160 .* 96x128"):
        small(**VIT)(other, masks(2, (2, 5)))


@pytest.mark.parametrize(
    "settings,words",
    [
        (dict(decoder="unett"), ["model.decoder 'unett'", "did you mean 'unet'"]),
        (dict(decoder="unet", decoder_dim=34), ["decoder_dim=34", "halved", "17 is odd"]),
        (dict(decoder="unet", decoder_dim=4), ["decoder_dim=4", "8 or more"]),
        (dict(decoder="vit", decoder_heads=3), ["decoder_dim=32", "decoder_heads=3"]),
        (dict(decoder="unet", decoder_heads=2), ["model.decoder_heads=2", "unet has no such setting"]),
        (dict(decoder="unet", backend="minkowski"), ["sparse.backend=minkowski", "model.decoder=unet"]),
        (dict(pca=4000), ["loss.pca=4000", "3072"]),
        (dict(decoder_dim=0), ["decoder_dim=0"]),
    ],
)
def test_refused(settings, words):
    with pytest.raises(ValueError) as caught:
        small(**settings)
    assert "\n" not in str(caught.value) and all(w in str(caught.value) for w in words), caught.value
