"""Whether the sparse encoder's cost grows with what is visible: one step at several mask ratios, interleaved.

    python benchmarks/mask_ratio.py --model fcmae_convnextv2_atto --batch-size 16

A step is the encoder's forward and backward, as in train_step.py. The relative columns are times over the visible
share, divided by that of the first ratio: flat at 1 means that hidden regions cost nothing. The bare matmuls show
what the vendor's library makes of fewer rows.
"""

from __future__ import annotations

import json
from functools import partial

import torch
from timing import arguments, interleaved, machine, markdown, summary
from train_step import DTYPES, bare_matmuls, encoder_step

from fcmae import create_model
from fcmae.errors import UsageError
from fcmae.masking import keep_count, mask_from_noise
from fcmae.models.support import BACKENDS


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.4, 0.6, 0.75, 0.9])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = parser.parse_args()

    torch.manual_seed(0)
    device, side = torch.device(args.device), args.image_size // 32
    model = create_model(args.model, image_size=args.image_size).to(device)
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    steps, shares = {}, {}
    for ratio in args.ratios:
        try:
            keep = keep_count(side * side, ratio)
        except UsageError as error:
            parser.error(str(error))
        mask = mask_from_noise(torch.rand(args.batch_size, side, side), keep).to(device)
        tiles, dtype = model.tiles(images, mask), DTYPES[args.dtype]
        native, reference = (
            partial(encoder_step, model.encoder, model, images, BACKENDS[name], tiles, dtype)
            for name in ("native", "reference")
        )
        steps[f"{ratio}"] = native
        steps[f"{ratio} matmuls"], _ = bare_matmuls(reference, device)
        shares[f"{ratio}"] = keep / side**2

    found = {name: summary(times) for name, times in interleaved(steps, args.rounds, device).items()}
    print(f"{args.model}, B={args.batch_size}, {args.image_size} px, {args.dtype}:", machine(device))
    rows, first = [], f"{args.ratios[0]}"
    for name, share in shares.items():
        row = [name, f"{share:.3f}"]
        for kind in ("", " matmuls"):
            time, base = (found[n + kind]["median_s"] for n in (name, first))
            row += [f"{time * 1e3:.1f}", f"{time / share / (base / shares[first]):.2f}"]
        rows.append(row)
    print(markdown(["mask ratio", "visible share", "step ms", "relative", "matmuls ms", "relative"], rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"ratios": found, "shares": shares, "machine": machine(device)}, file, indent=1)


if __name__ == "__main__":
    main()
