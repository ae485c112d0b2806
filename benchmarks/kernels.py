"""Time every kernel at every stage of a model, beside the reference, a measured copy and a measured matmul.

    python benchmarks/kernels.py --model fcmae_convnextv2_atto --batch-size 16 --json kernels.json

Bytes count each tensor that goes in or out once, so "of copy" says how near a kernel is to doing nothing but moving
them. FLOPs count taps on visible pixels only. The input gradient of the convolution is the convolution again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from timing import arguments, interleaved, machine, markdown, summary

from fcmae import create_model
from fcmae.kernels import mlp, reference
from fcmae.kernels.devices import kernels_for
from fcmae.kernels.tiles import TILE_SIZES, Tiles
from fcmae.masking import keep_count, mask_from_noise

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def visible_taps(tiles: Tiles, t: int) -> int:
    """How many of the 49 taps of all visible pixels fall on visible pixels."""
    seen = (~tiles.mask).float()[:, None].repeat_interleave(t, 2).repeat_interleave(t, 3)
    counts = F.conv2d(seen, torch.ones(1, 1, 7, 7, device=seen.device), padding=3)
    return int((counts * seen).sum().item())


def cases(tiles: Tiles, t: int, c: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple]:
    """Name, a call that takes a module of kernels, bytes and FLOP, for each kernel at one stage."""
    b, keep = tiles.keep.shape
    n = keep * t * t

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, grad = (drawn(b, keep, t, t, c, dtype=dtype) for _ in range(2))
    weight, bias = drawn(c, 1, 7, 7) / 7, drawn(c)
    taps = 2 * visible_taps(tiles, t) * c
    size = x.numel() * x.element_size()
    yield "tile_conv", lambda k: k.tile_conv(x, weight, bias, tiles), 2 * size, taps
    yield "tile_conv_weight_grad", lambda k: k.tile_conv_weight_grad(x, grad, 7, tiles), 2 * size, taps

    f = 4 * c
    h, z = (drawn(b, n, f, dtype=dtype) for _ in range(2))
    d = torch.zeros_like(h)  # the backward works in place; of zeros it makes zeros, however often
    b1, gamma, beta = (drawn(f) for _ in range(3))
    squares = reference.gelu_grn(h, b1, gamma, beta, z)
    yield "gelu_grn", lambda k: k.gelu_grn(h, b1, gamma, beta, z), 8 * size, 0
    yield "gelu_grn_backward", lambda k: k.gelu_grn_backward(h, b1, gamma, beta, squares, d, z), 16 * size, 0

    rows = [drawn(b * n, c, dtype=dtype) for _ in range(4)]
    _, mean, rstd = torch.native_layer_norm(rows[1].float(), (c,), bias, bias, 1e-6)
    yield (
        "layer_norm_backward",
        lambda k: k.layer_norm_backward(rows[0], rows[1], mean, rstd, bias, bias, rows[2], rows[3]),
        4 * size,
        0,
    )
    w = mlp.Weights(
        bias,
        bias,
        *(p.to(dtype) for p in (drawn(f, c) / c**0.5, b1)),
        gamma,
        beta,
        drawn(c, f).to(dtype),
        bias.to(dtype),
    )
    matmul = 4 * b * n * c * f
    saved = mlp.forward(reference, rows[0], rows[1], w, b)[1:]
    yield "block_mlp", lambda k: mlp.forward(k, rows[0], rows[1], w, b), 3 * size + 4 * size, matmul
    yield "block_mlp_backward", lambda k: mlp.backward(k, rows[0], rows[1], w, *saved), 7 * size, 2 * matmul


def ceilings(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written) and FLOP a second of a square matmul."""
    side, count = (8192, 2**28) if device.type == "cuda" else (1024, 2**25)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(count, device=device) for _ in range(2))
    found = interleaved({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, 9, device)
    copy, matmul = (summary(found[name])["median_s"] for name in ("copy", "matmul"))
    return 8 * count / copy, 2 * side**3 / matmul


def measured(
    run: Callable, native, device: torch.device, rounds: int, moved: int, flop: int, copy: float, matmul: float
) -> dict[str, float]:
    """One line of the table."""
    found = interleaved({"native": lambda: run(native), "reference": lambda: run(reference)}, rounds, device)
    seconds = summary(found["native"])["median_s"]
    return {
        "native_ms": seconds * 1e3,
        "reference_over_native": summary(found["reference"])["median_s"] / seconds,
        "gb_s": moved / seconds / 1e9,
        "of_copy": moved / seconds / copy,
        "gflop_s": flop / seconds / 1e9,
        "of_matmul": flop / seconds / matmul,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16", "fp16"])
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(args.device)
    side = args.image_size // 32
    keep = keep_count(side * side, args.mask_ratio)
    tiles = Tiles.from_mask(mask_from_noise(torch.rand(args.batch_size, side, side), keep), keep).to(device)
    dims = create_model(args.model, image_size=args.image_size).encoder.dims
    native = kernels_for(device, True)
    print(f"{args.model}, B={args.batch_size}, {args.image_size} px, mask {args.mask_ratio}:", machine(device))

    lines = []
    for name in args.dtype:
        copy, matmul = ceilings(DTYPES[name], device)
        print(f"\n{name}: copy {copy / 1e9:.1f} GB/s, matmul {matmul / 1e9:.0f} GFLOP/s\n")
        rows = []
        for t, c in zip(TILE_SIZES, dims, strict=True):
            for kernel, run, moved, flop in cases(tiles, t, c, DTYPES[name], device):
                line = measured(run, native, device, args.rounds, moved, flop, copy, matmul)
                lines.append({"kernel": kernel, "tile": t, "channels": c, "dtype": name, **line})
                compute = [f"{line['gflop_s']:.1f}", f"{line['of_matmul']:.0%}"] if flop else ["", ""]
                rows.append(
                    [kernel, f"{t}", f"{c}", f"{line['native_ms']:.3f}", f"{line['reference_over_native']:.1f}"]
                    + [f"{line['gb_s']:.1f}", f"{line['of_copy']:.0%}", *compute]
                )
        header = ["kernel", "tile", "channels", "native ms", "reference / native", "GB/s", "of copy", "GFLOP/s"]
        print(markdown([*header, "of matmul"], rows))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"kernels": lines, "machine": machine(device), "settings": vars(args)}, file, indent=1)


if __name__ == "__main__":
    main()
