"""The measures against their definitions, on small tensors."""

import copy
import math

import pytest
import timm
import torch

from fcmae.analysis import activations, attention_distance, cka, filters, receptive_field
from fcmae.analysis.blocks import blocks_of, mlps_of
from fcmae.analysis.cosine_distance import cosine_distance
from fcmae.analysis.position_similarity import similarities
from fcmae.models import FCMAE, MAE
from helpers import close, shake


def test_cosine_distance_against_a_double_loop():
    x = torch.randn(3, 10, 6, dtype=torch.float64)
    x[1, :, 2] = 0
    for image, found in zip(x, cosine_distance(x), strict=True):
        total = 0.0
        for i in range(6):
            for j in range(6):
                a, b = image[:, i], image[:, j]
                length = (a.norm() * b.norm()).item()
                total += (1 - (a @ b).item() / length if length else 1.0) / 2
        assert found.item() == pytest.approx(total / 36)
    equal = torch.randn(2, 10, 1).expand(-1, -1, 5)
    assert cosine_distance(equal).abs().max() < 1e-12


def distance_by_hand(weights, grid, patch, prefix):
    """Of one head, (N, N)."""
    total, patches = 0.0, grid[0] * grid[1]
    for i in range(patches):
        row = [weights[prefix + i][prefix + j].item() for j in range(patches)]
        for j in range(patches):
            rows, columns = (i // grid[1] - j // grid[1]) * patch[0], (i % grid[1] - j % grid[1]) * patch[1]
            total += row[j] / sum(row) * math.hypot(rows, columns)
    return total / patches


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_attention_distance_against_a_double_loop(prefix):
    grid, patch = (2, 3), (8, 16)
    weights = torch.randn(2, 4, 6 + prefix, 6 + prefix, dtype=torch.float64).softmax(-1)
    found = attention_distance.attention_distance(weights, attention_distance.patch_distances(grid, patch), prefix)
    for b in range(2):
        for h in range(4):
            assert found[b, h].item() == pytest.approx(distance_by_hand(weights[b, h], grid, patch, prefix))
    itself = torch.eye(6 + prefix).expand(1, 1, -1, -1)
    assert attention_distance.attention_distance(itself, attention_distance.patch_distances(grid, patch), prefix) == 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("norms", [{}, {"qk_norm": True}])
def test_attention_distance_of_a_timm_vit_by_hand(fused, norms):
    """Weights computed here from queries and keys, whichever way timm computes attention."""
    model = timm.models.VisionTransformer(
        img_size=(32, 48), patch_size=16, embed_dim=24, depth=2, num_heads=3, num_classes=0, reg_tokens=2, **norms
    )
    shake(model).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    images = torch.randn(2, 3, 32, 48)
    distances = attention_distance.patch_distances((2, 3), (16, 16))
    found = attention_distance.attention_distances(model, images.split(1), distances)
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for name, block in zip(("block 1", "block 2"), model.blocks, strict=True):
        attn, normed = block.attn, block.norm1(x)
        q, k, _ = attn.qkv(normed).reshape(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
        weights = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) / 8**0.5).softmax(-1)
        for head in range(3):
            for image in range(2):
                expected = distance_by_hand(weights[image, head].detach(), (2, 3), (16, 16), 3)
                assert found[name][head][image] == pytest.approx(expected, rel=1e-4)
        x = block(x)


def test_silent_channels():
    x = torch.randn(4, 50, 6, dtype=torch.float64)
    x[..., 1] = 0.001 * x[..., 1]
    x[..., 2] = 3 + 0.01 * x[..., 2]
    x[..., 3] = 0
    channels = activations.Channels()
    for part in x.split(3):
        channels.add(part)
    flat = x.flatten(0, 1)
    for found, expected in zip(
        channels.mean_std_rms(), (flat.mean(0), flat.std(0, correction=0), flat.square().mean(0).sqrt()), strict=True
    ):
        close(found, expected, 1e-10)
    dead, saturated = activations.silent_channels(*channels.mean_std_rms())
    assert dead.nonzero().flatten().tolist() == [1, 3] and saturated.nonzero().flatten().tolist() == [2]


def hsic_by_hand(k, l):  # noqa: E741
    """Equation 3 of arXiv 2010.15327 in matrices."""
    n, one = len(k), torch.ones(len(k), dtype=k.dtype)
    k, l = k.clone().fill_diagonal_(0), l.clone().fill_diagonal_(0)  # noqa: E741
    first = torch.trace(k @ l)
    second = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one @ k @ l @ one)
    return (first + second - third) / (n * (n - 3))


def test_cka_against_the_definition_and_its_invariances():
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, 5, dtype=torch.float64), torch.randn(12, 7, dtype=torch.float64)
    y[:, :5] += 3 * x[:, 0]
    k, l = cka.gram(x), cka.gram(y)  # noqa: E741
    close(k[2, 7], (x[2] * x[7]).sum(), 1e-12)
    close(cka.hsic(k, l), hsic_by_hand(k, l), 1e-12)
    value = cka.minibatch_cka([([k], [l])])
    close(value[0, 0], hsic_by_hand(k, l) / (hsic_by_hand(k, k) * hsic_by_hand(l, l)).sqrt(), 1e-12)
    assert 0.1 < value < 0.99
    turned, _ = torch.linalg.qr(torch.randn(15, 15, dtype=torch.float64))
    moved = cka.gram(-3 * x.flatten(1) @ turned + torch.randn(15, dtype=torch.float64))
    close(cka.minibatch_cka([([moved], [l])]), value, 1e-9)
    close(cka.minibatch_cka([([k, l], [k, l])]).diagonal(), torch.ones(2), 1e-12)
    # Batches add up before they are divided: of the same batch twice it is the same.
    close(cka.minibatch_cka([([k], [l]), ([k], [l])]), value, 1e-12)
    unrelated = torch.stack([cka.hsic(k, cka.gram(torch.randn(12, 7, dtype=torch.float64))) for _ in range(300)])
    assert unrelated.mean().abs() < 4 * unrelated.std() / 300**0.5  # unbiased
    same = cka.gram(torch.randn(1, 40).expand(12, 40) + 1e-9)  # all examples alike, but for rounding
    assert torch.isnan(cka.minibatch_cka([([k, same], [l])])).tolist() == [[False], [True]]


def test_gated_mlps_and_attention_that_sees_more_than_queries_and_keys_are_left_alone():
    gated = timm.create_model("eva02_tiny_patch14_224", depth=1, num_classes=0)
    assert blocks_of(gated) and mlps_of(gated, "fc1") == {}
    plain = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert [len(found) for found in (mlps_of(plain, "fc2"), attention_distance.attentions_of(plain))] == [1, 1]
    assert attention_distance.attentions_of(timm.create_model("samvit_base_patch16", depth=1)) == {}


def test_an_influence_field_ends_where_the_network_does():
    """Without GRN the last stage's centre sees 3 positions of every stage to each side, and no further."""
    torch.manual_seed(0)
    model = shake(FCMAE(576, depths=(1, 1, 1, 1), dims=(4, 4, 4, 4), decoder_dim=4, norm="none")).eval()
    field, _ = receptive_field.influence(model, torch.randn(1, 3, 576, 576))
    # The centre's 32 pixels begin at 288; each stage's 7x7 adds 3 of its positions.
    reach = 3 * (4 + 8 + 16 + 32)
    inside = slice(288 - reach, 320 + reach)
    outside = field.clone()
    outside[inside, inside] = 0
    assert (outside == 0).all() and field[288 - reach, 300] > 0 and field[300, 320 + reach - 1] > 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_masked_pixels_have_no_influence(backend):
    mask = torch.tensor([[True, False, True], [True, False, False]])
    hidden = mask.repeat_interleave(32, 0).repeat_interleave(32, 1)
    images = torch.randn(2, 3, 64, 96)
    vit = MAE((64, 96), dim=24, depth=2, heads=2, decoder_dim=8, decoder_depth=0, decoder_heads=1, mask_unit=32)
    convnext = FCMAE((64, 96), depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), decoder_dim=4, backend=backend)
    for model in (convnext, vit) if backend == "native" else (convnext,):
        shake(model).eval()
        field, centre = receptive_field.influence(model, images, mask)
        assert centre == ((48, 48) if model is convnext else (40, 56))  # of the region, of the patch
        assert (field[hidden] == 0).all() and (field[~hidden] > 0).all()
        x = images[:1].clone().requires_grad_()
        if model is convnext:
            model.encode(x, mask[None])[0, :, 1, 1].sum().backward()
        else:  # the patch in row 2, column 3 comes after two visible ones of each row before and one of its own
            bare = copy.deepcopy(model)
            bare.norm = torch.nn.Identity()
            bare.encode(x, mask[None])[0, 1 + 2 + 2 + 1].sum().backward()
        close(receptive_field.influence(model, images[:1], mask)[0], x.grad.abs().sum((0, 1)).double(), 1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_a_networks_last_norm_and_its_strides_have_no_part_in_the_field(name):
    """The sum of what a LayerNorm puts out is constant at first; padded convolutions see around another centre."""
    torch.manual_seed(0)
    network = timm.create_model(name, **({"img_size": 96, "depth": 2} if name.startswith("vit") else {})).eval()
    field, centre = receptive_field.influence(network, torch.randn(2, 3, 96, 96))
    near, far = receptive_field.radii(field, centre)
    assert field.sum() > 0.1 and near < far
    if name == "resnet10t":
        rows = torch.arange(96, dtype=torch.float64) + 0.5
        assert centre == pytest.approx(
            ((field.sum(1) @ rows / field.sum()).item(), (field.sum(0) @ rows / field.sum()).item())
        )
    else:
        assert centre == (56, 56)


def test_radii():
    field = torch.zeros(9, 9, dtype=torch.float64)
    field[4, 4], field[4, 7], field[0, 4] = 6, 3, 1
    assert receptive_field.radii(field, (4.5, 4.5), (0.5, 0.8, 0.95)) == [0.0, 3.0, 4.0]
    assert receptive_field.radii(field * 0, (4.5, 4.5)) == [0.0, 0.0]


def test_principal_components_and_similarities():
    directions = torch.linalg.qr(torch.randn(27, 2, dtype=torch.float64))[0].T
    weights = torch.randn(40, 2, dtype=torch.float64) * torch.tensor([5.0, 1.0], dtype=torch.float64)
    kernels = (weights @ directions + 0.7).reshape(40, 3, 3, 3)
    found, shares = filters.principal_components(kernels, 3)
    assert shares.sum() == pytest.approx(1) and shares[0] > 0.9 and shares[2] < 1e-12
    span = found[:2].flatten(1)
    close(span @ span.T, torch.eye(2, dtype=torch.float64), 1e-9)
    close(directions @ span.T @ span, directions, 1e-9)
    positions = torch.randn(5, 7)
    expected = torch.stack([torch.nn.functional.cosine_similarity(a, positions, dim=-1) for a in positions])
    close(similarities(positions).float(), expected, 1e-5)


@pytest.mark.parametrize(
    "name,first,last,count",
    [
        ("convnext_atto", "stage 1 block 1", "stage 4 block 2", 12),
        ("vit_tiny_patch16_224", "block 1", "block 12", 12),
        ("resnet18", "stage 1 block 1", "stage 4 block 2", 8),
        ("efficientnet_b0", "stage 1 block 1", "stage 7 block 1", 16),
        ("swin_tiny_patch4_window7_224", "stage 1 block 1", "stage 4 block 2", 12),
    ],
)
def test_blocks_of_timm_models(name, first, last, count):
    with torch.device("meta"):
        found = list(blocks_of(timm.create_model(name)))
    assert (found[0], found[-1], len(found)) == (first, last, count)
