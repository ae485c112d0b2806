"""benchmarks/scaling.py against figures worked out by hand."""

import sys

import pytest

from slurm_cluster import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from scaling import MIB, Cluster, Step, all_reduce, estimate, gradient_buckets  # noqa: E402

NO_COST = Cluster(gpus_per_node=8, intra=float("inf"), inter=float("inf"), latency=0.0)


def test_buckets_are_filled_from_the_last_parameter():
    sizes = [30 * MIB, 10 * MIB, 20 * MIB, 1, MIB]
    assert gradient_buckets(sizes) == [MIB, 30 * MIB + 1, 30 * MIB]
    assert gradient_buckets([5]) == [5]


def test_an_all_reduce_moves_a_rings_bytes():
    cluster = Cluster(gpus_per_node=4, intra=100.0, inter=10.0, latency=0.5)
    assert all_reduce(80, 1, cluster) == 0
    assert all_reduce(80, 4, cluster) == pytest.approx(2 * 3 / 4 * 80 / 100 + 2 * 3 * 0.5)
    between = 2 * 3 / 4 * 80 / 10 + 2 * 2 * 0.5  # 4 nodes: a tree of two levels
    assert all_reduce(80, 16, cluster) == pytest.approx(all_reduce(80, 4, cluster) + between)


def test_without_a_network_to_wait_for_only_fixed_costs_are_lost():
    step = Step(image=0.01, pass_=0.0, backward=0.5, batch=64)
    for gpus in (1, 8, 64):
        row = estimate(step, [100, 200], gpus, 4096, NO_COST)
        assert row["efficiency"] == pytest.approx(1) and row["exposed"] == 0
        assert row["passes"] * row["images_per_pass"] * gpus == 4096
    with_cost = Step(image=0.01, pass_=0.08, backward=0.5, batch=64, update=0.1)
    row = estimate(with_cost, [100], 512, 4096, NO_COST)  # 8 images: 0.08 + 0.08 s, and the update
    assert row["seconds"] == pytest.approx(0.26)
    assert row["efficiency"] == pytest.approx((40.96 + 64 * 0.08 + 0.1) / 512 / 0.26)


def test_exchange_hides_behind_the_backward_pass_but_for_its_end():
    slow = Cluster(gpus_per_node=1, intra=1.0, inter=100.0, latency=0.0)
    step = Step(image=1.0, pass_=0.0, backward=0.5, batch=8)
    # 2 GPUs, 8 images each: backward from 4 to 8 s; two buckets of 50 bytes, full at 6 and at 8 s, exchanged in 0.5 s
    row = estimate(step, [50, 50], 2, 16, slow)
    assert (row["compute"], row["exchange"]) == (8.0, 1.0) and row["exposed"] == pytest.approx(0.5)
    # ten times the bytes: the second waits for the first
    assert estimate(step, [500, 500], 2, 16, slow)["seconds"] == pytest.approx(6 + 2 * 5)
