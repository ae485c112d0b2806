"""Time one training step of the sparse encoder against its alternatives, interleaved in one process.

    python benchmarks/train_step.py --model fcmae_convnextv2_atto --batch-size 16 --image-size 224 --json atto.json

A step is the encoder's forward and backward on masked images, all parameters' gradients included (--whole adds decoder,
loss and AdamW). Arms: the backends, the dense network times the mask in two memory layouts, eager and compiled, and the
bare matmuls of the sparse step: its floor. MinkowskiEngine joins where it is installed and computes in the dtype.
Memory is what a step holds at most beyond weights and images.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from functools import partial

import torch
from timing import arguments, interleaved, machine, markdown, peak_mb, summary
from torch.utils._python_dispatch import TorchDispatchMode

from fcmae import create_model
from fcmae.errors import UsageError
from fcmae.kernels.tiles import Tiles
from fcmae.masking import keep_count, mask_from_noise
from fcmae.minkowski import engine
from fcmae.minkowski.encoder import MinkowskiConvNeXtV2
from fcmae.models.fcmae import FCMAE
from fcmae.models.support import BACKENDS, MINKOWSKI, MaskedSupport

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MATMULS = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2), torch.ops.aten.bmm.default: (0, 1)}


class ContiguousMaskedSupport(MaskedSupport):
    """The dense convolution on (B, C, H, W) memory instead of channels-last."""

    def conv(self, x, weight, bias):
        y = torch.nn.functional.conv2d(
            self.visible(x).permute(0, 3, 1, 2).contiguous(), weight, bias, padding=3, groups=x.shape[-1]
        )
        return y.permute(0, 2, 3, 1)


def encoder_step(encode: Callable, model: FCMAE, images: torch.Tensor, support: Callable, tiles: Tiles, dtype) -> None:
    """Forward and backward of the encoder alone; the mean stands in for a loss."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        features = encode(images, support(tiles))
    features.float().mean().backward()
    model.zero_grad(set_to_none=True)


def whole_step(forward: Callable, model: FCMAE, images: torch.Tensor, backend: str, optimizer, tiles: Tiles, dtype):
    """Encoder, decoder, loss, gradients and AdamW, with a backend."""
    model.backend = backend
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        loss, *_ = forward(images, tiles)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Recorder(TorchDispatchMode):
    """The operands' shapes and strides of every matrix product."""

    def __init__(self):
        super().__init__()
        self.operands: list[list[tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in MATMULS:
            self.operands.append([(args[i].shape, args[i].stride(), args[i].dtype) for i in MATMULS[func]])
        return func(*args, **(kwargs or {}))


def minkowski(model: FCMAE, device: torch.device, dtype) -> FCMAE | None:
    """The same model on MinkowskiEngine; None, and a line that says why, where that cannot run."""
    try:
        engine.load()
        engine.check_device(device)
        engine.check_dtype(dtype or torch.float32)
    except UsageError as error:
        print(f"no {MINKOWSKI} arm: {error}")
        return None
    twin = copy.deepcopy(model)
    twin.encoder = MinkowskiConvNeXtV2(twin.encoder).to(device)
    return twin


def bare_matmuls(step: Callable[[], None], device: torch.device) -> tuple[Callable[[], None], float]:
    """The matrix products that a step does, replayed alone, and their GFLOP."""
    with Recorder() as recorder:
        step()
    made: dict[tuple, torch.Tensor] = {}
    pairs, flop = [], 0
    for operands in recorder.operands:
        for key in operands:
            shape, stride, dtype = key
            if key not in made:
                made[key] = torch.empty_strided(shape, stride, dtype=dtype, device=device).uniform_(-1, 1)
        a, b = (made[key] for key in operands)
        pairs.append((a, b))
        flop += 2 * a.numel() * b.shape[-1]

    def run() -> None:
        for a, b in pairs:
            a @ b

    return run, flop / 1e9


def arms(model: FCMAE, images: torch.Tensor, tiles: Tiles, dtype, whole: bool) -> dict[str, Callable[[], None]]:
    """Name to one step, for every arm but the matmuls."""
    compiled = torch.compile(model if whole else model.encoder, dynamic=False, fullgraph=True)
    twin = minkowski(model, images.device, dtype)
    if whole:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        made = {name: partial(whole_step, model, model, images, name, optimizer, tiles, dtype) for name in BACKENDS}
        made["dense compiled"] = partial(whole_step, compiled, model, images, "dense", optimizer, tiles, dtype)
        if twin is not None:
            own = torch.optim.AdamW(twin.parameters(), lr=1e-6)
            made[MINKOWSKI] = partial(whole_step, twin, twin, images, MINKOWSKI, own, tiles, dtype)
        return made
    eager = partial(encoder_step, model.encoder, model, images)
    made = {name: partial(eager, support, tiles, dtype) for name, support in BACKENDS.items()}
    if twin is not None:
        made[MINKOWSKI] = partial(encoder_step, twin.encoder, twin, images, lambda tiles: tiles, tiles, dtype)
    made["dense contiguous"] = partial(eager, ContiguousMaskedSupport, tiles, dtype)
    fast = partial(encoder_step, compiled, model, images)
    made["dense compiled"] = partial(fast, MaskedSupport, tiles, dtype)
    made["dense contiguous compiled"] = partial(fast, ContiguousMaskedSupport, tiles, dtype)
    return made


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The figures that docs/performance.md keeps: how many times native's time or memory."""
    time = {name: arm["median_s"] for name, arm in found.items()}
    best = min(value for name, value in time.items() if name.startswith("dense"))
    made = {
        "best_dense_over_native": best / time["native"],
        "reference_over_native": time["reference"] / time["native"],
        "native_over_matmuls": time["native"] / time["matmuls"],
        "peak_native_over_dense_eager": found["native"]["peak_mb"] / found["dense"]["peak_mb"],
    }
    if MINKOWSKI in time:
        made["minkowski_over_native"] = time[MINKOWSKI] / time["native"]
    return made


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--whole", action="store_true", help="the whole step: decoder, loss and AdamW too")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled arms")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # for the dense arms
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    model = create_model(args.model, image_size=args.image_size, mask_ratio=args.mask_ratio).to(device)
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    side = args.image_size // model.mask_unit
    mask = mask_from_noise(torch.rand(args.batch_size, side, side), keep_count(side * side, args.mask_ratio))
    tiles = model.tiles(images, mask.to(device))

    steps = arms(model, images, tiles, dtype, args.whole)
    if args.no_compile:
        steps = {name: step for name, step in steps.items() if "compiled" not in name}
    steps["matmuls"], gflop = bare_matmuls(steps["reference"], device)
    peaks = {name: peak_mb(step, device) for name, step in steps.items()}
    times = interleaved(steps, args.rounds, device)
    found = {name: {**summary(times[name]), "peak_mb": peaks[name]} for name in steps}

    made = ratios(found)
    tflops = gflop / found["native"]["median_s"] / 1e3
    print(
        f"{args.model}, B={args.batch_size}, {args.image_size} px, mask {args.mask_ratio}, {args.dtype}:",
        machine(device),
    )
    rows = [
        [name, f"{a['median_s'] * 1e3:.1f}", f"{a['q1_s'] * 1e3:.1f}-{a['q3_s'] * 1e3:.1f}", f"{a['peak_mb']:.0f}"]
        for name, a in found.items()
    ]
    print(markdown(["arm", "median ms", "quartiles ms", "peak MiB"], rows))
    print(f"matmuls of the sparse step: {gflop:.1f} GFLOP; native runs them at {tflops:.3f} TFLOP/s of the whole step")
    print(", ".join(f"{name} {value:.2f}" for name, value in made.items()))
    if args.json:
        settings = {**vars(args), "matmul_gflop": gflop}
        with open(args.json, "w") as file:
            json.dump({"arms": found, "ratios": made, "machine": machine(device), "settings": settings}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
