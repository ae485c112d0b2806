"""The model: sparse against dense, against timm, sizes, and what it refuses."""

import pytest
import timm
import torch

from fcmae import FCMAE, create_model
from fcmae.kernels.tiles import Tiles
from fcmae.layouts import timm as timm_layout
from fcmae.models import CONVNEXTV2_SIZES
from fcmae.models.norms import GRN
from fcmae.models.support import BACKENDS, DenseSupport
from helpers import TOLERANCE, close, masks, shake

SMALL = dict(depths=(1, 2, 1, 2), dims=(8, 12, 20, 24), decoder_dim=16)
PARAMETERS_M = dict(atto=3.7, femto=5.2, pico=9.1, nano=15.6, tiny=28.6, base=89, large=198, huge=660)


def small(backend="reference", dtype=torch.float64, seed=0, **settings):
    settings = {**SMALL, "image_size": (128, 96), "backend": backend, **settings}
    return shake(FCMAE(**settings).to(dtype), seed)


def images(batch, channels, size, dtype=torch.float64, seed=0):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


@pytest.mark.parametrize("grn", ["per_image", "batch"])
@pytest.mark.parametrize("channels,size", [(1, (128, 96)), (5, (96, 256)), (3, (224, 224)), (13, (32, 160))])
def test_sparse_is_dense_times_mask(channels, size, grn):
    """All four tile sizes at once: features, loss and every gradient."""
    x = images(3, channels, size)
    mask = masks(3, (size[0] // 32, size[1] // 32))
    outputs = {}
    for backend in ("reference", "dense"):
        model = small(backend, in_chans=channels, image_size=size, grn=grn)
        loss, pred, _ = model(x, mask)
        loss.backward()
        outputs[backend] = [loss, pred, model.encode(x, mask), *(p.grad for p in model.parameters())]
    for sparse, dense in zip(*outputs.values(), strict=True):
        close(sparse, dense, TOLERANCE[torch.float64])


def test_masked_regions_are_zero_and_unseen():
    model, x, mask = small(), images(2, 3, (128, 96)), masks(2, (4, 3))
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    features = model.encode(x, mask)
    assert (features.permute(0, 2, 3, 1)[mask] == 0).all() and (features.permute(0, 2, 3, 1)[~mask] != 0).all()
    other = torch.where(hidden, images(2, 3, (128, 96), seed=9), x)
    assert torch.equal(model.encode(other, mask), features)


@pytest.mark.parametrize("size", ["atto", "nano", "tiny"])
def test_nothing_masked_is_timms_dense_network(size):
    """Through the exported layout, so that it is timm's own forward; float64 leaves no room for a wrong term."""
    model = shake(create_model(f"fcmae_convnextv2_{size}", image_size=64, decoder_dim=8).double())
    dense = timm.create_model(f"convnextv2_{size}", num_classes=0).double().eval()
    dense.load_state_dict(timm_layout.from_model(model.state_dict()), strict=True)
    x = images(2, 3, (64, 96))
    with torch.no_grad():
        expected = dense.forward_features(x)
        close(model.encode(x), expected, 1e-11)
        close(model.encode(x, torch.zeros(2, 2, 3, dtype=torch.bool)), expected, 1e-11)


def test_a_batch_mate_changes_nothing():
    model, x, mask = small(), images(2, 3, (128, 96)), masks(2, (4, 3))
    changed = x.clone()
    changed[1] = images(1, 3, (128, 96), seed=5)[0]
    other_mask = mask.clone()
    other_mask[1] = masks(1, (4, 3), seed=7)[0]
    first = model(x, mask)[1][0]
    assert torch.equal(model(changed, other_mask)[1][0], first)
    pooled = small(grn="batch")
    assert not torch.equal(pooled(changed, mask)[1][0], pooled(x, mask)[1][0])


@pytest.mark.parametrize("size", CONVNEXTV2_SIZES)
def test_parameter_counts(size):
    with torch.device("meta"):
        encoder = create_model(f"fcmae_convnextv2_{size}").encoder
        dense = timm.create_model(f"convnextv2_{size}")
    ours = sum(p.numel() for p in encoder.parameters())
    head = sum(p.numel() for p in dense.head.parameters())
    assert ours + head == sum(p.numel() for p in dense.parameters())
    assert round((ours + head) / 1e6, 1 if PARAMETERS_M[size] < 50 else None) == PARAMETERS_M[size]


def test_initialisation():
    torch.manual_seed(0)
    model = create_model("fcmae_convnextv2_atto")
    for name, p in model.named_parameters():
        if name.endswith("bias") or ".grn." in name:
            assert (p == 0).all(), name
        elif "norm" in name or ".stem.1" in name or "downsample.0" in name:
            assert (p == 1).all(), name
        elif p.numel() > 1000:
            assert 0.018 < p.std() < 0.022, name


def test_tables_spare_nothing_but_the_check():
    model, x, mask = small(), images(2, 3, (128, 96)), masks(2, (4, 3))
    assert torch.equal(model(x, mask)[0], model(x, Tiles.from_mask(mask, int((~mask[0]).sum())))[0])


def test_a_drawn_mask_keeps_the_ratio():
    _, _, mask = small()(images(4, 3, (128, 96)))
    assert ((~mask).flatten(1).sum(1) == int(12 * (1 - 0.6))).all()
    assert not torch.equal(mask[0], mask[1]) or not torch.equal(mask[1], mask[2])


SLOWLY = [pytest.param(b, marks=pytest.mark.slow) for b in BACKENDS if b != "native"]


@pytest.mark.parametrize("backend", ["native", *SLOWLY])
@pytest.mark.parametrize("given", ["nothing", "mask", "tables"])
def test_whole_step_compiles_to_one_graph(given, backend):
    model = small(backend, dtype=torch.float32)
    x, mask = images(2, 3, (128, 96), torch.float32), masks(2, (4, 3))
    argument = {"nothing": None, "mask": mask, "tables": Tiles.from_mask(mask, 4)}[given]
    torch.compiler.reset()  # both families share code, which other tests compiled for other shapes
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    loss, pred, used = compiled(x, argument)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected_loss, expected, _ = model(x, used)
    expected_loss.backward()
    close(pred, expected, TOLERANCE[torch.float32])
    for a, p in zip(grads, model.parameters(), strict=True):
        close(a, p.grad, TOLERANCE[torch.float32])


def test_compiled_graph_refuses_a_mask_of_another_count():
    torch.compiler.reset()
    compiled = torch.compile(small(dtype=torch.float32), fullgraph=True, dynamic=False, backend="aot_eager")
    with pytest.raises(RuntimeError, match="mask_ratio"):
        compiled(images(2, 3, (128, 96), torch.float32), masks(2, (4, 3), ratio=0.4))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_fp32(precision):
    x, mask = images(2, 3, (128, 96), torch.float32), masks(2, (4, 3))
    model = small(dtype=torch.float32)
    exact = model(x, mask)[1]
    with torch.autocast("cpu", dtype=precision):
        loss, pred, _ = model(x, mask)
    assert loss.dtype == torch.float32
    close(pred, exact, 0.05)


@pytest.mark.parametrize(
    "settings,words",
    [
        (dict(image_size=100), ["height 100", "96 and 128"]),
        (dict(image_size=(64, 20)), ["width 20", "smallest is 32"]),
        (dict(mask_ratio=0.99), ["keeps none of the 12"]),
        (dict(mask_ratio=0.0), ["between 0 and 1"]),
        (dict(mask_ratio=1.5), ["between 0 and 1"]),
        (dict(grn="layer"), ["per_image, batch"]),
        (dict(backend="dens"), ["did you mean 'dense'"]),
        (dict(depths=(1, 2)), ["four positive numbers"]),
        (dict(dims=(0, 1, 2, 3)), ["four positive numbers"]),
    ],
)
def test_refused_settings(settings, words):
    with pytest.raises(ValueError) as caught:
        FCMAE(**{**SMALL, "image_size": (128, 96), **settings})
    assert "\n" not in str(caught.value) and all(w in str(caught.value) for w in words), caught.value


def test_refused_masks():
    model, x = small(), images(2, 3, (128, 96))
    uneven = masks(2, (4, 3))
    uneven[0, 0] = True
    uneven[0, 1:] = False
    for mask, words in [
        (uneven, "same number"),
        (torch.ones(2, 4, 3, dtype=torch.bool), "none of the regions"),
        (masks(2, (3, 4)), "(2, 4, 3)"),
        (masks(2, (4, 3)).float(), "bool"),
    ]:
        with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
            model(x, mask)
    with pytest.raises(ValueError, match="hides none"):
        model(x, torch.zeros(2, 4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be"):
        model(x[:, :2])
    with pytest.raises(ValueError, match="height 100"):
        model(x[:, :, :100])


def test_unknown_model_lists_near_ones():
    with pytest.raises(ValueError, match="fcmae_convnextv2_atto"):
        create_model("convnextv2_ato")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grn_by_definition_and_where_a_channel_is_zero(dtype):
    x = torch.randn(2, 5, 4, 6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[..., 2] = 0
    x.requires_grad_()
    grn = GRN(6).to(dtype)
    torch.nn.init.ones_(grn.weight)
    norm = x.detach().double().flatten(1, 2).norm(dim=1)[:, None, None]
    expected = x.detach().double() * (1 + norm / (norm.mean(-1, keepdim=True) + 1e-6))
    y = grn(x, DenseSupport())
    close(y, expected, TOLERANCE[dtype])
    y.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(grn.weight.grad).all()
