"""The benchmarks run from the checkout, on small inputs, and leave figures that can be right."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "fcmae_convnextv2_atto", "--batch-size", "2", "--image-size", "64", "--device", "cpu"]

pytestmark = pytest.mark.slow


def run(script: str, tmp_path: Path, *args: str) -> tuple[dict, str]:
    """The figures that a script leaves, and what it prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *SMALL, "--rounds", "3", *args]
    done = subprocess.run([*command, "--json", str(tmp_path / "x.json")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "x.json").read_text()), done.stdout


@pytest.mark.parametrize("whole", [False, True])
def test_train_step(tmp_path, whole):
    found, shown = run("train_step.py", tmp_path, *(["--whole"] if whole else []))
    arms = {"native", "reference", "dense", "dense compiled", "matmuls"}
    arms |= {"minkowski"} if importlib.util.find_spec("MinkowskiEngine") else set()
    assert arms <= found["arms"].keys() and {"cpu", "torch", "threads", "kernels"} <= found["machine"].keys()
    for name, arm in found["arms"].items():
        assert arm["median_s"] > 0 and arm["peak_mb"] > 0 and name in shown
    time = {name: arm["median_s"] for name, arm in found["arms"].items()}
    assert found["ratios"]["native_over_matmuls"] == pytest.approx(time["native"] / time["matmuls"])
    best = min(seconds for name, seconds in time.items() if name.startswith("dense"))
    assert found["ratios"]["best_dense_over_native"] == pytest.approx(best / time["native"])
    # Memory does not depend on the machine's mood. AdamW's is the same for every arm, and most of so small a step's.
    if not whole:
        assert found["arms"]["native"]["peak_mb"] < found["arms"]["dense"]["peak_mb"]
    # By hand, stem and last stage of one image: 64 px keep one region of four.
    assert found["settings"]["matmul_gflop"] > 2 * 3 * 2 * (64 * 48 * 40 + 2 * 8 * 320 * 320) / 1e9


def test_kernels(tmp_path):
    found, shown = run("kernels.py", tmp_path, "--dtype", "fp32")
    assert len(found["kernels"]) == 4 * 7 and "of copy" in shown
    for line in found["kernels"]:
        assert line["native_ms"] > 0 and line["gb_s"] > 0 and line["kernel"] in shown


def test_mask_ratio(tmp_path):
    found, shown = run("mask_ratio.py", tmp_path, "--ratios", "0.25", "0.5", "0.75")
    assert found["shares"] == {"0.25": 0.75, "0.5": 0.5, "0.75": 0.25} and "relative" in shown
    assert found["ratios"].keys() == {f"{r}{kind}" for r in found["shares"] for kind in ("", " matmuls")}


def test_mae_step(tmp_path):
    found, shown = run("mae_step.py", tmp_path, "--model", "mae_vit_tiny_patch16")
    time = {name: arm["median_s"] for name, arm in found["arms"].items()}
    assert time.keys() == {"ours", "published"} and all(name in shown for name in time)
    assert found["ratios"]["published_over_ours"] == pytest.approx(time["published"] / time["ours"])
    assert all(arm["median_s"] > 0 and arm["peak_mb"] > 0 for arm in found["arms"].values())
    # Two formulations of one loss, on the same weights and the same hidden patches.
    assert found["losses"]["ours"] == pytest.approx(found["losses"]["published"], rel=1e-5)
    assert found["settings"]["model"] == "mae_vit_tiny_patch16"


def test_step_cost(tmp_path):
    found, shown = run("step_cost.py", tmp_path, "--batch-size", "8")
    times, cost = {name: arm["median_s"] for name, arm in found["times"].items()}, found["cost"]
    assert cost["image_ms"] == pytest.approx(1e3 * (times["pass 8"] - times["pass 2"]) / 6)
    assert cost["update_ms"] == pytest.approx(1e3 * times["update"]) and cost["pass_ms"] >= 0 < cost["backward"] < 1
    assert f"--image-ms {cost['image_ms']:.3g} --pass-ms {cost['pass_ms']:.3g}" in shown
