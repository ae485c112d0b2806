"""Which parameter has which learning rate and weight decay: every size against the published scheme written out."""

import dataclasses
import re

import pytest
import timm
import torch

from fcmae.downstream import groups
from fcmae.downstream.settings import DownstreamTrain
from fcmae.errors import UsageError
from fcmae.layouts.convnext_spec import ConvNextSpec
from fcmae.layouts.vit_spec import VitSpec
from fcmae.models import CONVNEXTV2_SIZES, VIT_SIZES
from fcmae.train.optim import set_lr

# (arXiv 2301.00808 and the authors' pages) by depths: the last layer's id, and the ids of each stage's blocks.
SINGLE = {
    (2, 2, 6, 2): (13, [[1, 2], [3, 4], [5, 6, 7, 8, 9, 10], [11, 12]]),
    (2, 2, 8, 2): (15, [[1, 2], [3, 4], [5, 6, 7, 8, 9, 10, 11, 12], [13, 14]]),
    (3, 3, 27, 3): (37, [[1, 2, 3], [4, 5, 6], list(range(7, 34)), [34, 35, 36]]),
    (3, 3, 9, 3): (19, [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14, 15], [16, 17, 18]]),
}
NINE_TRIPLES = [3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 11]
GROUPED = {(3, 3, 27, 3): (13, [[1, 1, 1], [2, 2, 2], NINE_TRIPLES, [12, 12, 12]])}
DECAY = {"atto": 0.9, "femto": 0.9, "pico": 0.9, "nano": 0.9, "tiny": 0.9, "base": 0.6, "large": 0.6, "huge": 0.75}


def convnext(size: str):
    depths, dims = CONVNEXTV2_SIZES[size]
    with torch.device("meta"):
        model = timm.create_model(f"convnextv2_{size}", num_classes=10)
    return model, ConvNextSpec(in_chans=3, depths=depths, dims=dims, classes=10)


def vit(size: str, pool: str = "avg"):
    patch, dim, depth, heads = VIT_SIZES[size]
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size}_patch{patch}_224", num_classes=10, global_pool=pool)
    tokens = (224 // patch) ** 2
    return model, VitSpec(in_chans=3, patch_size=patch, tokens=tokens, dim=dim, depth=depth, heads=heads, classes=10)


def found(model, spec, **train) -> dict[str, tuple[float, float]]:
    """lr scale and weight decay of every parameter."""
    made = groups.make_groups(model, spec, DownstreamTrain(weight_decay=0.05, **train))
    assert len({(g["layer"], g["weight_decay"]) for g in made}) == len(made)
    pairs = [(name, (g["lr_scale"], g["weight_decay"])) for g in made for name, _ in g["params"]]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def expected_decay(name: str) -> float:
    """0.05 for the weights of convolutions and linear layers, and nothing else."""
    if name in ("cls_token", "pos_embed") or "norm" in name or "grn" in name or name.endswith("bias"):
        return 0.0
    return 0.0 if re.fullmatch(r"stem\.1\.weight|stages\.\d\.downsample\.0\.weight", name) else 0.05


@pytest.mark.parametrize("size", CONVNEXTV2_SIZES)
def test_convnext(size):
    model, spec = convnext(size)
    grouped = size in ("base", "large")  # arXiv 2301.00808, appendix A.2
    last, blocks = (GROUPED if grouped else SINGLE)[spec.depths]
    opening = [1, 2, 3, 12] if grouped else [ids[0] for ids in blocks]
    rows = found(model, spec, layer_decay=DECAY[size])
    assert set(rows) == {name for name, _ in model.named_parameters()}
    for name, (scale, decay) in rows.items():
        if name.startswith("stem."):
            layer = 0 if grouped else 1
        elif name.startswith("head."):
            layer = last
        else:
            stage, kind, block = re.match(r"stages\.(\d)\.(\w+)\.(\d+)", name).groups()
            layer = blocks[int(stage)][int(block)] if kind == "blocks" else opening[int(stage)]
        assert scale == pytest.approx(DECAY[size] ** (last - layer), rel=1e-12), name
        assert decay == expected_decay(name), name
    assert min(s for s, _ in rows.values()) == pytest.approx(DECAY[size] ** (13 if grouped else last - 1))
    assert rows["head.fc.weight"] == (1.0, 0.05) and rows["head.fc.bias"] == (1.0, 0.0)


@pytest.mark.parametrize("size", VIT_SIZES)
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_vit(size, pool):
    model, spec = vit(size, pool)
    depth = {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32}[size]
    rate = {"base": 0.65}.get(size, 0.75)
    rows = found(model, spec, layer_decay=rate)
    assert set(rows) == {name for name, _ in model.named_parameters()}
    for name, (scale, decay) in rows.items():
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            assert name in ("norm.weight", "norm.bias", "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
            layer = depth + 1
        assert scale == pytest.approx(rate ** (depth + 1 - layer), rel=1e-12), name
        assert decay == expected_decay(name), name
    assert rows["pos_embed"] == (pytest.approx(rate ** (depth + 1)), 0.0) and rows["patch_embed.proj.weight"][1] == 0.05


def test_groups_of_three_for_other_depths():
    """Seven blocks of stage 3 make three groups, so that stage 4 has 6 and the head 7."""
    spec = ConvNextSpec(in_chans=3, depths=(1, 2, 7, 1), dims=(8, 8, 8, 8))
    names = [f"stages.2.blocks.{b}.norm.weight" for b in range(7)]
    assert [groups.layer_of(name, spec, "group") for name in names] == [3, 3, 3, 4, 4, 4, 5]
    others = (
        "stem.0.weight",
        "stages.0.blocks.0.norm.bias",
        "stages.1.downsample.0.bias",
        "stages.3.downsample.1.bias",
    )
    assert [groups.layer_of(name, spec, "group") for name in others] == [0, 1, 2, 6]
    assert groups.layer_of("head.fc.weight", spec, "group") == groups.last_layer(spec, "group") == 7


def test_the_scheme_may_be_chosen_and_no_decay_leaves_one_rate():
    model, spec = convnext("base")
    assert found(model, spec, layer_decay=0.9, layer_decay_scheme="block")["stem.0.weight"][0] == pytest.approx(0.9**36)
    assert {scale for scale, _ in found(model, spec).values()} == {1.0}
    with pytest.raises(UsageError, match="group is for ConvNets"):
        found(*vit("tiny"), layer_decay=0.9, layer_decay_scheme="group")


def test_the_optimizer_follows_the_groups():
    """A first step of AdamW moves every parameter by lr * scale; LARS adapts weights alone."""
    spec = ConvNextSpec(in_chans=3, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    model = timm.models.convnext.ConvNeXt(depths=spec.depths, dims=spec.dims, use_grn=True, ls_init_value=None)
    train = DownstreamTrain(weight_decay=0.0, layer_decay=0.5)
    parts = groups.make_groups(model, spec, train)
    scales = {name: g["lr_scale"] for g in parts for name, _ in g["params"]}
    optimizer = groups.make_optimizer(parts, train, torch.device("cpu"))
    set_lr(optimizer, 0.25)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p, torch.full_like(p, 0.25 * scales[name]), rtol=1e-4, atol=1e-5)
    lars = groups.make_optimizer(parts, dataclasses.replace(train, optimizer="lars"), torch.device("cpu"))
    adapted = {name for g in lars.param_groups if g["always_adapt"] for name in g["param_names"]}
    assert adapted == {name for name, p in model.named_parameters() if p.ndim > 1}


def test_the_printout_names_every_parameter_once():
    model, spec = convnext("atto")
    text = groups.describe(groups.make_groups(model, spec, DownstreamTrain(layer_decay=0.9)))
    rows = [line.split() for line in text.splitlines()[1:]]
    assert sorted(name for row in rows for name in row[3:]) == sorted(name for name, _ in model.named_parameters())
    assert rows[0][:3] == ["1", "0.28243", "0"] and rows[-1][:2] == ["13", "1"]
