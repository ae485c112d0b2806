"""Estimate how a model's training scales over GPUs from stated inputs; docs/scaling.md has the formulas.

    python benchmarks/scaling.py --model fcmae_convnextv2_base --image-ms 0.5 --intra 300 --inter 50

Nothing is measured here but the model's gradient buckets: every other input is an argument, and is printed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from fcmae import create_model

MIB = 2**20


@dataclass(frozen=True)
class Cluster:
    """What gradients travel over."""

    gpus_per_node: int
    intra: float  # bytes/s of one GPU to the others of its node
    inter: float  # bytes/s of one node to the others
    latency: float  # seconds of one hop


@dataclass(frozen=True)
class Step:
    """What one GPU computes: `image` seconds an image and `pass_` besides, however few images it has."""

    image: float
    pass_: float
    backward: float  # share of a pass that is the backward one
    batch: int  # images a pass at most
    update: float = 0.0  # seconds of the optimizer


def gradient_buckets(sizes: Sequence[int], cap: float = 25 * MIB, first: float = MIB) -> list[int]:
    """Bytes of DDP's buckets, in the order in which the backward pass fills them.

    sizes: bytes of the gradients, in the order of the model's parameters. A bucket is closed by the gradient that fills
    it, the first at `first` bytes so that the exchange begins early (torch.nn.parallel.DistributedDataParallel).
    """
    buckets, held, limit = [], 0, first
    for size in reversed(sizes):
        held += size
        if held >= limit:
            buckets.append(held)
            held, limit = 0, cap
    return [*buckets, held] if held else buckets


def all_reduce(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds to sum `size` bytes over `gpus`: scattered within nodes, summed between them, gathered within them.

    The bytes of a ring, which is the least there is, with the hops of a ring within nodes and of a tree between them.
    """
    local = min(gpus, cluster.gpus_per_node)
    nodes = -(-gpus // cluster.gpus_per_node)
    within = 2 * (local - 1) / local * size / cluster.intra + 2 * (local - 1) * cluster.latency
    between = 2 * (nodes - 1) / nodes * size / cluster.inter + 2 * math.ceil(math.log2(nodes)) * cluster.latency
    return within + between


def estimate(step: Step, buckets: Sequence[int], gpus: int, effective_batch: int, cluster: Cluster) -> dict[str, float]:
    """One optimizer step on `gpus`: images a pass, passes, seconds; `exposed` is what of the exchange is waited for.

    All passes but the last keep their gradients. The last one's backward fills the buckets at an even rate of bytes,
    and they are exchanged one after another, each as soon as it is full.
    """
    images = effective_batch / gpus
    passes = max(1, -(-effective_batch // (gpus * step.batch)))
    once = step.pass_ + step.image * images / passes
    compute = passes * once
    begin, whole, filled, free = compute - step.backward * once, sum(buckets), 0, 0.0
    for size in buckets:
        filled += size
        ready = begin + step.backward * once * filled / whole
        free = max(free, ready) + all_reduce(size, gpus, cluster)
    seconds = max(compute, free) + step.update
    exchange = sum(all_reduce(size, gpus, cluster) for size in buckets)
    alone = effective_batch * step.image + step.update + step.pass_ * -(-effective_batch // step.batch)  # on one GPU
    return {
        "gpus": gpus, "images_per_pass": images / passes, "passes": passes, "compute": compute, "exchange": exchange,
        "exposed": seconds - step.update - compute, "seconds": seconds, "images_per_second": effective_batch / seconds,
        "efficiency": alone / gpus / seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fcmae_convnextv2_base")
    parser.add_argument("--image-ms", type=float, required=True, help="forward and backward of one image on one GPU")
    parser.add_argument("--pass-ms", type=float, default=0.0, help="of a pass besides, however few its images")
    parser.add_argument("--update-ms", type=float, default=0.0, help="of the optimizer, once a step")
    parser.add_argument("--backward", type=float, default=2 / 3, help="share of a pass that is the backward one")
    parser.add_argument("--batch-size", type=int, default=64, help="images a pass at most")
    parser.add_argument("--effective-batch", type=int, default=4096)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--intra", type=float, required=True, help="GB/s of a GPU to the others of its node")
    parser.add_argument("--inter", type=float, required=True, help="GB/s of a node to the others")
    parser.add_argument("--latency-us", type=float, default=10.0, help="of one hop")
    parser.add_argument("--gradient-bytes", type=int, default=4, help="of one parameter's gradient")
    parser.add_argument("--json", help="write the figures there")
    given = parser.parse_args()

    with torch.device("meta"):
        model = create_model(given.model)
    sizes = [p.numel() * given.gradient_bytes for p in model.parameters() if p.requires_grad]
    buckets = gradient_buckets(sizes)
    step = Step(given.image_ms / 1e3, given.pass_ms / 1e3, given.backward, given.batch_size, given.update_ms / 1e3)
    cluster = Cluster(given.gpus_per_node, given.intra * 1e9, given.inter * 1e9, given.latency_us / 1e6)
    rows = [estimate(step, buckets, gpus, given.effective_batch, cluster) for gpus in given.gpus]

    print(f"{given.model}: {sum(sizes) / MIB:.0f} MiB of gradients in {len(buckets)} buckets")
    print(f"inputs: {asdict(step)} {asdict(cluster)}, effective batch {given.effective_batch}\n")
    print("| GPUs | images x passes | compute ms | exchange ms | waited for ms | img/s | efficiency |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        times = " | ".join(f"{1e3 * row[key]:.1f}" for key in ("compute", "exchange", "exposed"))
        print(
            f"| {row['gpus']} | {row['images_per_pass']:g} x {row['passes']} | {times} "
            f"| {row['images_per_second']:,.0f} | {row['efficiency']:.0%} |"
        )
    if given.json:
        with open(given.json, "w") as file:
            json.dump(
                {"bucket_bytes": buckets, "step": asdict(step), "cluster": asdict(cluster), "rows": rows},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
