"""A comparison by two processes, each with a loader worker: the same runs, one report."""

import json
import subprocess
import sys

import pytest

from small_comparison import ARMS, arguments, labelled, make_place
from small_runs import environment, metrics

pytestmark = pytest.mark.slow


def compare(arguments: list[str], processes: int) -> str:
    """The command to its end; what it printed."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *ranks, "-m", "fcmae.compare", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks_in_turn_follow_one(tmp_path):
    place = make_place(tmp_path)
    shared = [labelled(place), "arms_in_turn=true", "budget.steps=6", "data.workers=1"]
    compare(arguments(place, tmp_path / "one", *shared), 1)
    two = arguments(place, tmp_path / "two", *shared, "train.batch_size=4")
    assert compare(two, 2).count("report.html") == 1  # one rank speaks
    for name in ARMS:
        one, both = (metrics(tmp_path / out / "arms" / name) for out in ("one", "two"))
        assert [row["loss"] for row in both] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    found, alone = (json.loads((tmp_path / out / "report.json").read_text()) for out in ("two", "one"))
    assert found["machine"]["processes"] == 2 and found["arms"]["vit"]["images_per_step"] == 8
    for name in ARMS:
        trained = (r["arms"][name]["representation"]["trained"] for r in (found, alone))
        assert len({r["knn"]["top1"] for r in trained}) == 1
    assert "the comparison is complete" in compare(two, 2)
