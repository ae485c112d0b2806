"""Probing: frozen is frozen, linear is partial with no block, kNN is a vote counted by hand."""

import json
import math

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from ending import ended
from fcmae.downstream.batch_norm import normalize_features, plain
from fcmae.downstream.data import open_parts
from fcmae.downstream.frozen import Frozen, last_blocks
from fcmae.downstream.labelled import CentreCrops
from fcmae.layouts.convnext_spec import ConvNextSpec
from fcmae.layouts.vit_spec import VitSpec
from fcmae.models import create_model
from fcmae.probe import main
from labelled_runs import LAST, PLAIN, arguments, assert_same_outcome, make_place, results, start
from small_runs import final_state

LINEAR = (
    *PLAIN, "ema.enabled=false", "train.steps=8", "train.layer_decay=null", "train.optimizer=lars", "train.lr=0.5",
    "train.weight_decay=0", "model.head_init_scale=0.5", "log.print_every=1000",
)  # fmt: skip
VIT = VitSpec(in_chans=3, patch_size=16, tokens=4, dim=192, depth=12, heads=3)
CONVNEXT = ConvNextSpec(in_chans=3, depths=(2, 2, 6, 2), dims=(40, 80, 160, 320))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def linear(place):
    assert main(arguments(place, place / "linear", *LINEAR, "--mode", "linear")) == 0
    return place / "linear"


@pytest.fixture(scope="module")
def partial(place):
    given = arguments(place, place / "partial", *LINEAR, "probe.blocks=[0,0.5,1,2,5]")
    assert main([*given, "--mode", "partial"]) == 0
    return place / "partial"


def changed(place, run) -> set[str]:
    """The modules of the encoder whose weights a run has moved."""
    names = set()
    begin, end = (torch.load(place / "tiny.pt", weights_only=True), load_file(run / LAST))
    for key, x in begin.items():
        if key.startswith("encoder."):
            there = end[key.removeprefix("encoder.")].reshape(x.shape)
            if not torch.equal(there, x):
                names.add(".".join(key.split(".")[1:-1]))
    return names


def test_linear_is_partial_with_no_block(linear, partial):
    for name in (LAST, "metrics.jsonl", "validation.jsonl"):
        assert (linear / name).read_bytes() == (partial / "blocks_0" / name).read_bytes()


def test_only_the_last_blocks_move(place, partial):
    mlp = {f"stages.3.blocks.0.{m}" for m in ("norm", "mlp.fc1", "mlp.grn", "mlp.fc2")}
    last = mlp | {f"stages.3.{m}" for m in ("blocks.0.conv_dw", "downsample.0", "downsample.1")}
    assert changed(place, partial / "blocks_0") == set()
    assert changed(place, partial / "blocks_0.5") == mlp
    assert changed(place, partial / "blocks_1") == last
    third = {m.replace("stages.3.blocks.0", "stages.2.blocks.1") for m in last if "blocks" in m}
    assert changed(place, partial / "blocks_2") == last | third
    every = changed(place, partial / "blocks_5")
    assert not any(name.startswith("stem") for name in every) and "stages.0.blocks.0.conv_dw" in every
    assert results(partial / "blocks_0.5")["frozen_tensors_unchanged"] > 30


def test_the_curve_over_blocks(partial):
    found = results(partial)
    assert list(found["blocks"]) == ["0", "0.5", "1", "2", "5"]
    for name, row in found["blocks"].items():
        assert row["last"] == results(partial / f"blocks_{name}")["last"]
    assert (partial / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_probe_is_left_alone(place, partial):
    before = {p: p.stat().st_mtime_ns for p in partial.glob("blocks_*/[!.]*")}
    given = arguments(place, partial, *LINEAR, "probe.blocks=[0,0.5,1,2,5]", "--mode=partial")
    assert main(given) == 0
    assert before == {p: p.stat().st_mtime_ns for p in partial.glob("blocks_*/[!.]*")}


def test_timm_takes_a_linear_probe(place, linear):
    """The BatchNorm is part of the exported classifier: the logits are those of the probed model."""
    state = final_state(linear)["model"]
    model = timm.models.convnext.ConvNeXt(
        depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), num_classes=4, use_grn=True, ls_init_value=None, conv_mlp=True
    )
    if state["stages.0.blocks.0.mlp.fc1.weight"].ndim == 2:
        model = timm.models.convnext.ConvNeXt(
            depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), num_classes=4, use_grn=True, ls_init_value=None
        )
    model.load_state_dict(load_file(linear / LAST), strict=True)
    exported = model.eval()(x := torch.randn(6, 3, 32, 32))
    normalize_features(model)
    model.load_state_dict(state, strict=True)
    torch.testing.assert_close(model.eval()(x), exported, rtol=1e-4, atol=1e-5)
    assert state["head.fc.0.running_mean"].abs().max() > 0


@pytest.mark.parametrize("count", [0, 0.5, 3])
@pytest.mark.parametrize("name,spec", [("vit_tiny_patch16_224", VIT), ("convnextv2_atto", CONVNEXT)])
def test_what_is_frozen_rests(name, spec, count):
    """No gradient, no drop path and no running statistics outside of what is trained; a touched tensor is found."""
    size = {"img_size": 32} if name.startswith("vit") else {}
    model = timm.create_model(name, num_classes=4, drop_path_rate=0.9, **size)
    normalize_features(model)
    trained = last_blocks(spec, count)
    frozen = Frozen(model, trained)
    frozen.train()
    inside = lambda n: any(n == t or n.startswith(f"{t}.") for t in trained)  # noqa: E731
    assert all(module.training == inside(n) for n, module in model.named_modules())
    assert all(p.requires_grad == inside(n) for n, p in model.named_parameters())
    model(torch.randn(8, 3, 32, 32)).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= set(filter(inside, model.state_dict()))
    frozen.check()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0].add_(1e-3)
    with pytest.raises(RuntimeError, match="frozen tensors have changed"):
        frozen.check()


def test_a_batch_norm_becomes_part_of_the_classifier():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32)
    normalize_features(model)
    for _ in range(3):
        model.train()(torch.randn(8, 3, 32, 32))
    wanted = model.eval()(x := torch.randn(5, 3, 32, 32))
    other = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32)
    other.load_state_dict(plain(model), strict=True)
    torch.testing.assert_close(other.eval()(x), wanted, rtol=1e-4, atol=1e-5)


KNN = ("probe.neighbours=[3,20]", "model.drop_path=0")


def vote(train, labels, val, k: int) -> list[int]:
    """kNN by loops: the cosine to every training image, the k largest, exp(cosine / 0.07) for each one's class."""
    said = []
    for y in val.double().tolist():
        near = []
        for x, label in zip(train.double().tolist(), labels, strict=True):
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            near.append((dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y)), label))
        votes = [0.0] * 4
        for cosine, label in sorted(near, reverse=True)[:k]:
            votes[label] += math.exp(cosine / 0.07)
        said.append(votes.index(max(votes)))
    return said


@pytest.mark.parametrize(
    "init,pool", [("tiny.pt", "avg"), pytest.param("vit.pt", "avg", marks=pytest.mark.slow), ("vit.pt", "token")]
)
def test_knn_against_a_direct_loop(place, tmp_path, init, pool):
    """Features by this toolkit's own encoder, one image at a time."""
    given = arguments(place, tmp_path / "knn", *KNN, f"model.pool={pool}", "--mode", "knn", init=init)
    assert main(given) == 0
    if init == "tiny.pt":
        model = create_model("fcmae_convnextv2_atto", depths=[1, 1, 2, 1], dims=[8, 12, 16, 24], decoder_dim=16)
    else:
        size = {"image_size": 32, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
        model = create_model("mae_vit_tiny_patch16", **size)
    state = torch.load(place / init, weights_only=True)
    if init == "vit.pt":
        state = model.state_dict() | {k: v for k, v in state.items() if "pos_embed" not in k}
    model.load_state_dict(state)
    parts = open_parts(f"{place}/shapes/train", f"{place}/shapes/val", 3, 1.0, 0)
    made = {}
    for name, files in (("train", parts.train), ("val", parts.val)):
        rows = []
        for image, _ in CentreCrops(files, (32, 32), 3, None, None):
            with torch.no_grad():
                encoded = model.eval().encode(image[None])[0]
            rows.append(
                encoded.mean((1, 2)) if init == "tiny.pt" else encoded[0] if pool == "token" else encoded[1:].mean(0)
            )
        made[name] = torch.stack(rows), [label for _, label in files]
    found = results(tmp_path / "knn")
    for k in (3, 20):
        said = vote(made["train"][0], made["train"][1], made["val"][0], k)
        right = [a == b for a, b in zip(said, made["val"][1], strict=True)]
        assert found[f"knn_{k}"]["top1"] == pytest.approx(sum(right) / len(right))
    assert (tmp_path / "knn" / "curve.png").read_bytes()[:4] == b"\x89PNG"


def cache(out) -> dict:
    return {p.name: p.stat().st_mtime_ns for p in (out / "features").iterdir()}


def test_features_are_kept_as_long_as_they_hold(place, tmp_path):
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        (tmp_path / "data" / part).symlink_to(place / "shapes" / part)
    out = tmp_path / "knn"
    given = arguments(place, out, *KNN, "--mode", "knn")
    assert main(given) == 0
    first = cache(out)
    assert len(first) == 2
    assert main([*given, "probe.neighbours=[1]"]) == 0 and cache(out) == first
    assert set(results(out)) & {"knn_1", "knn_3"} == {"knn_1"}
    extra = place / "shapes" / "val" / "disc" / "zz.png"
    Image.new("RGB", (40, 40)).save(extra)
    try:
        assert main(given) == 0
    finally:
        extra.unlink()
    second = cache(out)
    assert len(second) == 2 and len(set(first) & set(second)) == 1  # those of train


@pytest.mark.slow
def test_processes_with_uneven_shares_find_the_same_features(place, tmp_path):
    assert main(arguments(place, tmp_path / "one", *KNN, "--mode", "knn")) == 0
    process = start("fcmae.probe", arguments(place, tmp_path / "three", *KNN, "--mode", "knn"), processes=3)
    _, errors = ended(process)
    assert process.returncode == 0, errors[-2000:]
    assert json.loads((tmp_path / "one" / "results.json").read_text()) == results(tmp_path / "three")
    for path in (tmp_path / "one" / "features").iterdir():
        ours, theirs = load_file(path), load_file(tmp_path / "three" / "features" / path.name)
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["features"], theirs["features"])


@pytest.mark.slow
def test_random_weights_are_the_baseline(place, tmp_path):
    given = ("model.name=vit_tiny_patch16_224", *KNN, "--mode", "knn")
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(arguments(place, tmp_path / out, *given, f"seed={seed}", init=None)) == 0
    a, b, c = ([load_file(p)["features"] for p in sorted((tmp_path / n / "features").iterdir())] for n in "abc")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and results(tmp_path / "a")["init"] is None
    assert not any(any(torch.equal(x, y) for y in c) for x in a)


@pytest.mark.slow
def test_linear_probing_on_two_processes(place, linear, tmp_path):
    """Batch statistics are each process's own, and the running ones their mean: validation sees one model."""
    more = (*LINEAR, "train.batch_size=4", "--mode", "linear")
    process = start("fcmae.probe", arguments(place, tmp_path / "two", *more), processes=2)
    _, errors = ended(process)
    assert process.returncode == 0, errors[-2000:]
    ours, theirs = (final_state(out)["model"]["head.fc.0.running_mean"] for out in (tmp_path / "two", linear))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # the mean of halves is the mean
    assert changed(place, tmp_path / "two") == set()


@pytest.mark.slow  # in one process: tests/test_finetune_resume.py
def test_a_probe_on_two_processes_resumes_to_the_same(place, tmp_path):
    """Statistics of BatchNorm included: what happens at a checkpoint changes nothing."""
    more = (*LINEAR, "train.batch_size=4", "train.warmup_epochs=0.5", "data.workers=1", "--mode", "linear")
    for name, every in (("whole", 100), ("parts", 3)):
        process = start("fcmae.probe", arguments(place, tmp_path / name, f"checkpoint.every={every}", *more), 2)
        _, errors = ended(process)
        assert process.returncode == 0, errors[-2000:]
    parts = tmp_path / "parts"
    (parts / "checkpoints" / "step_000000008.pt").unlink()
    for name in ("results.json", LAST):
        (parts / name).unlink()
    process = start("fcmae.probe", arguments(place, parts, "checkpoint.every=3", *more), 2)
    said, errors = ended(process)
    assert process.returncode == 0 and "going on from step 6" in said, errors[-2000:]
    assert_same_outcome(parts, tmp_path / "whole")
