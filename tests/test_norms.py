"""The norms in GRN's place: each by its definition, on every backend the same, and V1's block in timm."""

import pytest
import timm
import torch
import torch.nn.functional as F

from fcmae import FCMAE, create_model
from fcmae.kernels.tiles import Tiles, pack
from fcmae.layouts import timm as timm_layout
from fcmae.models.layers import Block
from fcmae.models.norms import LRN, BatchNorm, LayerNorm
from fcmae.models.support import DenseSupport, MaskedSupport, TileSupport
from helpers import TOLERANCE, close, masks, shake

SMALL = dict(image_size=(96, 128), depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), decoder_dim=16)
OTHERS = ["ln", "bn", "lrn", "none"]


def small(norm, backend="reference", dtype=torch.float64):
    return shake(FCMAE(**SMALL, norm=norm, backend=backend).to(dtype))


def images(batch, size=(96, 128), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def outputs(model, x, mask):
    loss, pred, _ = model(x, mask)
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and (g != 0).any() for g in grads)
    return [loss, pred, model.encode(x, mask), *grads, *(b.double() for b in model.buffers())]


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("backend,dtype", [("dense", torch.float64), ("native", torch.float32)])
def test_every_backend_is_the_reference(norm, backend, dtype):
    """Loss, prediction, features, every gradient, running statistics."""
    x, mask = images(3, dtype=dtype), masks(3, (3, 4))
    found, expected = (outputs(small(norm, b, dtype), x, mask) for b in (backend, "reference"))
    for a, b in zip(found, expected, strict=True):
        close(a, b, 10 * TOLERANCE[dtype])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", OTHERS)
def test_nothing_masked_is_the_dense_network(norm, training):
    model, x = small(norm).train(training), images(2)
    close(model.encode(x, torch.zeros(2, 3, 4, dtype=torch.bool)), model.encode(x), TOLERANCE[torch.float64])


@pytest.mark.parametrize("norm", OTHERS)
def test_hidden_pixels_are_unseen(norm):
    x, mask = images(2), masks(2, (3, 4))
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    other = torch.where(hidden, images(2, seed=9), x)
    for backend in ("reference", "dense"):
        model = small(norm, backend)
        assert torch.equal(model(other, mask)[1], model(x, mask)[1])


def test_bn_is_batch_norm_of_the_visible_rows():
    tiles = Tiles.from_mask(masks(3, (3, 4)), 4)
    x = torch.randn(3, 6, 8, 5, dtype=torch.float64)
    hidden = tiles.mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    x[hidden] = 1e6
    packed = pack(x, tiles)
    theirs = shake(torch.nn.BatchNorm1d(5).double())
    for support, features in ((MaskedSupport(tiles), x), (TileSupport(tiles, False), packed)):
        expected = torch.nn.BatchNorm1d(5).double()
        expected.load_state_dict(theirs.state_dict())
        ours = BatchNorm(5).double()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        for training in (True, True, False):
            expected.train(training)
            ours.train(training)
            rows = expected(packed.flatten(0, -2))
            close(support.rows(ours(features, support)), rows, TOLERANCE[torch.float64])
        for key, value in expected.state_dict().items():
            close(ours.state_dict()[key], value, 1e-12)
        assert ours.num_batches_tracked == 2 and not torch.equal(ours.running_mean, theirs.running_mean)


def test_bn_refuses_a_single_position():
    with pytest.raises(ValueError, match="norm=bn needs two visible positions"):
        BatchNorm(4)(torch.randn(1, 1, 1, 4), DenseSupport())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lrn_and_ln_are_pytorchs(dtype):
    x = (3 * torch.randn(2, 4, 6, 20, dtype=torch.float64)).to(dtype)
    found = LRN()(x, DenseSupport())
    expected = F.local_response_norm(x.double().permute(0, 3, 1, 2), 5, alpha=1e-4, beta=0.75, k=2.0)
    close(found, expected.permute(0, 2, 3, 1), TOLERANCE[dtype])
    close(LRN()(x[:, :, None], DenseSupport())[:, :, 0], found, TOLERANCE[dtype])  # of tiles
    norm = shake(LayerNorm(20)).to(dtype)
    expected = F.layer_norm(x.double(), (20,), norm.weight.double(), norm.bias.double(), eps=1e-6)
    close(norm(x, DenseSupport()), expected, TOLERANCE[dtype])


def test_none_is_v1s_block():
    block = Block(6, norm="none").double()
    close(block.gamma, torch.full((6,), 1e-6), 1e-6)
    assert "gamma" in dict(block.named_parameters()) and block.mlp.norm is None
    shake(block)
    x = torch.randn(2, 9, 8, 6, dtype=torch.float64)
    y = F.conv2d(x.permute(0, 3, 1, 2), block.conv_dw.weight, block.conv_dw.bias, padding=3, groups=6)
    y = F.layer_norm(y.permute(0, 2, 3, 1), (6,), block.norm.weight, block.norm.bias, eps=1e-6)
    y = block.mlp.fc2(F.gelu(block.mlp.fc1(y)))
    close(block(x, DenseSupport()), x + block.gamma * y, TOLERANCE[torch.float64])


@pytest.mark.parametrize("size", ["atto", pytest.param("tiny", marks=pytest.mark.slow)])
def test_v1_leaves_for_timm(size):
    """Without a missing key, through what timm_arguments says; of 1x1 convolutions (atto) and linear layers."""
    model = shake(create_model(f"fcmae_convnextv2_{size}", image_size=64, decoder_dim=8, norm="none").double())
    assert model.timm_arguments() == {"in_chans": 3, "use_grn": False, "ls_init_value": 1e-6}
    dense = timm.create_model(f"convnextv2_{size}", num_classes=0, **model.timm_arguments()).double().eval()
    dense.load_state_dict(timm_layout.from_model(model.state_dict()), strict=True)
    x = images(2, (64, 96))
    with torch.no_grad():
        close(model.encode(x), dense.forward_features(x), 1e-11)


@pytest.mark.parametrize("norm", ["grn", *OTHERS])
def test_what_each_norm_adds_to_the_state_dict(norm):
    keys = {key.split("blocks.0.")[1] for key in small(norm).state_dict() if "stages.0.blocks.0." in key}
    keys -= {f"{m}.{p}" for m in ("conv_dw", "norm", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")}
    affine = {"mlp.norm.weight", "mlp.norm.bias"}
    statistics = {f"mlp.norm.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")}
    assert keys == {
        "grn": {"mlp.grn.weight", "mlp.grn.bias"}, "ln": affine, "bn": affine | statistics,
        "lrn": {"mlp.norm.constants"},
        "none": {"gamma"},
    }[norm]  # fmt: skip
    assert (small(norm).timm_arguments() is None) == (norm in ("ln", "bn", "lrn"))


@pytest.mark.parametrize("norm", OTHERS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_fp32(norm, precision):
    model, x, mask = small(norm, "native", torch.float32), images(2, dtype=torch.float32), masks(2, (3, 4))
    exact = model(x, mask)[1]
    with torch.autocast("cpu", dtype=precision):
        loss, pred, _ = model(x, mask)
    assert loss.dtype == torch.float32
    close(pred, exact, 0.05)


@pytest.mark.slow
def test_bn_compiles_to_one_graph():
    x, mask = images(2, dtype=torch.float32), masks(2, (3, 4))
    torch.compiler.reset()
    model, expected = small("bn", "native", torch.float32), small("bn", "native", torch.float32)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    found, wanted = compiled(x, mask)[1], expected(x, mask)[1]
    close(found, wanted, TOLERANCE[torch.float32])
    for a, b in zip(model.buffers(), expected.buffers(), strict=True):
        close(a, b, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    "settings,words",
    [
        (dict(norm="gn"), ["model.norm 'gn'", "grn, ln, bn, lrn, none"]),
        (dict(norm="bn", grn="batch"), ["sparse.grn=batch", "model.norm=bn"]),
        (dict(norm="none", backend="minkowski"), ["sparse.backend=minkowski", "model.norm=none"]),
    ],
)
def test_refused(settings, words):
    with pytest.raises(ValueError) as caught:
        FCMAE(**SMALL, **settings)
    assert "\n" not in str(caught.value) and all(w in str(caught.value) for w in words), caught.value
