"""On a GPU: the native backend against the reference, under autocast and compile, in a CUDA graph, and resumed.

The kernels alone are in test_triton_conv.py and test_triton_rows.py.
"""

import json

import pytest
import torch

from fcmae import create_model
from fcmae.analyze import WHATS
from fcmae.analyze import main as analyze
from fcmae.kernels import backends
from fcmae.masking import mask_from_noise
from fcmae.pretrain import main
from fcmae.visualize import main as visualize
from helpers import TOLERANCE, close, shake
from small_runs import CONFIG, assert_same_run, make_pictures
from small_subjects import make_images, make_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = {"image_size": 96, "depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24), "decoder_dim": 16}


def step(backend, dtype=None, compiled=False):
    """Loss and all gradients of one step; the same weights, images and masks each time."""
    model = shake(create_model("fcmae_convnextv2_atto", backend=backend, **SMALL)).cuda()
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0)).cuda()
    mask = mask_from_noise(torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(1)), 3).cuda()
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    tiles = model.tiles(images, mask)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        loss, pred, _ = forward(images, tiles)
    (loss * 1024).backward()  # as a loss scaler would: fp16 has no room below
    return loss, pred, *(p.grad / 1024 for p in model.parameters())


def test_the_kernels_are_active():
    assert backends()["cuda"].startswith("Triton")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_native_is_the_reference(dtype, compiled):
    tolerance = 5 * TOLERANCE[dtype] if dtype else 1e-4
    for ours, theirs in zip(step("native", dtype, compiled), step("reference"), strict=True):
        close(ours, theirs, tolerance)


def test_a_step_repeats_bit_for_bit():
    for first, second in zip(step("native", torch.bfloat16), step("native", torch.bfloat16), strict=True):
        assert torch.equal(first, second)


def test_a_step_waits_for_nothing_and_fits_a_cuda_graph():
    model = create_model("fcmae_convnextv2_atto", **SMALL).cuda()
    images = torch.rand(3, 3, 96, 96, device="cuda")
    tiles = model.tiles(images, mask_from_noise(torch.rand(3, 3, 3), 3).cuda())

    def run():
        model.zero_grad(set_to_none=False)
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            loss, *_ = model(images, tiles)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = run().item()
        grads = [p.grad.clone() for p in model.parameters()]
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    graph.replay()
    assert loss.item() == expected
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


def test_analyses_find_what_they_find_on_a_cpu(tmp_path):
    make_images(tmp_path)
    runs = [str(make_run(tmp_path / kind, kind, tmp_path / "all")) for kind in ("convnext", "vit")]
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        assert analyze([*runs, "--what", *WHATS, "--count", "4", "--device", device, "--out", str(out)]) == 0
        found[device] = {what: numbers(json.loads((out / f"{what}.json").read_text())["results"]) for what in WHATS}
    for what in WHATS:
        ours, theirs = (torch.tensor(found[device][what]) for device in ("cuda", "cpu"))
        close(ours, theirs, 1e-3)
    assert visualize([*runs, "--device", "cuda", "--ratios", "0.5", "--out", str(tmp_path / "looks")]) == 0


def numbers(found) -> list[float]:
    """All of nested plain data, in order."""
    if isinstance(found, (dict, list)):
        return [x for part in (found.values() if isinstance(found, dict) else found) for x in numbers(part)]
    return [float(found)] if isinstance(found, (int, float)) else []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, precision):
    make_pictures(tmp_path / "pictures")
    (tmp_path / "config.yaml").write_text(CONFIG.replace("device: cpu", "device: cuda").replace("60", "20"))

    def train(out, *more):
        overrides = [f"data.source={tmp_path / 'pictures'}", f"train.precision={precision}", "checkpoint.every=10"]
        assert main([str(tmp_path / "config.yaml"), *overrides, f"out={tmp_path / out}", *more]) == 0

    train("whole")
    train("parts")
    for path in sorted((tmp_path / "parts" / "checkpoints").glob("step_*20.pt")):
        path.unlink()
    (tmp_path / "parts" / "encoder.safetensors").unlink()
    train("parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
