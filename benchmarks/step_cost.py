"""Measure what benchmarks/scaling.py asks for: a training step's cost of an image, of a pass and of the update.

    python benchmarks/step_cost.py --model fcmae_convnextv2_base --batch-size 64 --device cuda --dtype bf16

Passes of a fourth of the batch and of the whole batch, forward and forward with backward, and AdamW's update take turns
in one process; the slope between the two sizes is an image's cost, the rest a pass's.
"""

from __future__ import annotations

import json
from functools import partial

import torch
from timing import arguments, interleaved, machine, summary
from train_step import DTYPES

from fcmae import create_model
from fcmae.masking import keep_count, mask_from_noise


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = parser.parse_args()
    if args.batch_size < 4:
        parser.error("--batch-size must be 4 or more: a fourth of it is timed too")

    torch.manual_seed(0)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    model = create_model(args.model, image_size=args.image_size, mask_ratio=args.mask_ratio).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    side = args.image_size // model.mask_unit

    def forward(count: int) -> torch.Tensor:
        mask = mask_from_noise(torch.rand(count, side, side), keep_count(side * side, args.mask_ratio))
        images = torch.rand(count, 3, args.image_size, args.image_size, device=device)
        tiles = model.tiles(images, mask.to(device))
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return model(images, tiles)[0]

    def whole(count: int) -> None:
        for p in model.parameters():  # gradients are overwritten, as the first pass of a step does
            p.grad = None
        forward(count).backward()

    sizes = args.batch_size // 4, args.batch_size
    whole(sizes[0])  # before the update, which needs gradients
    steps = {f"pass {n}": partial(whole, n) for n in sizes} | {"update": optimizer.step}
    steps["forward"] = partial(forward, sizes[1])
    found = {name: summary(times) for name, times in interleaved(steps, args.rounds, device).items()}

    small, large, update, once = (found[name]["median_s"] for name in steps)
    image = (large - small) / (sizes[1] - sizes[0])
    cost = {
        "image_ms": 1e3 * image,
        "pass_ms": 1e3 * max(0.0, large - sizes[1] * image),
        "update_ms": 1e3 * update,
        "backward": 1 - once / large,
    }
    settings = f"{args.model}, {args.image_size} px, mask {args.mask_ratio}, {args.dtype}, passes of {sizes}"
    print(f"{settings}: {machine(device)}")
    for name, arm in found.items():
        print(f"{name:>9}: {1e3 * arm['median_s']:.1f} ms ({1e3 * arm['q1_s']:.1f}-{1e3 * arm['q3_s']:.1f})")
    told = " ".join(f"--{name.replace('_', '-')} {value:.3g}" for name, value in cost.items())
    print(f"for scaling.py: --model {args.model} {told}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"times": found, "cost": cost, "machine": machine(device), "settings": vars(args)}, file, indent=1
            )


if __name__ == "__main__":
    main()
