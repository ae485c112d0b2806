"""Time one training step of MAE against the published formulation of it, interleaved in one process.

    python benchmarks/mae_step.py --model mae_vit_base_patch16 --batch-size 16 --json mae.json

A step is encoder, decoder, loss, gradients and AdamW; both arms share weights, masks and loss, and the script stops if
their losses differ. The published formulation follows the description in arXiv 2111.06377 §3, "Simple implementation":
embed every patch, shuffle each image's tokens by noise, keep the first, encode; append mask tokens, unshuffle, add
positions, decode. Its attention is the softmax of q k^T written out. Memory is what a step holds at most beyond
weights and images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import arguments, interleaved, machine, markdown, peak_mb, summary
from torch import Tensor
from train_step import DTYPES

from fcmae import MAE, create_model
from fcmae.kernels.tiles import Tiles
from fcmae.loss import masked_pixel_loss
from fcmae.masking import keep_count, mask_from_noise


def attention(attn: torch.nn.Module, x: Tensor) -> Tensor:
    """Multi-head self-attention of tokens (B, N, D) with the weights of timm's module, every matrix in memory."""
    b, n, d = x.shape
    q, k, v = attn.qkv(x).view(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
    weights = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


def transformer(blocks: torch.nn.ModuleList, x: Tensor) -> Tensor:
    """Pre-norm blocks on tokens (B, N, D)."""
    for block in blocks:
        x = x + attention(block.attn, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    return x


def published_loss(model: MAE, images: Tensor, noise: Tensor, keep: int) -> Tensor:
    """The loss by shuffling: noise (B, gh, gw), of which each image's `keep` smallest stay visible."""
    shuffle = noise.flatten(1).argsort(dim=1, stable=True)
    restore = shuffle.argsort(1)
    embedding = model.patch_embed.proj
    x = F.conv2d(images, embedding.weight, embedding.bias, stride=model.patch_size).flatten(2).transpose(1, 2)
    x = x + model.pos_embed[:, 1:]
    x = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, x.shape[-1]))
    first = (model.cls_token + model.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
    x = model.norm(transformer(model.blocks, torch.cat([first, x], 1)))

    x = model.decoder_embed(x)
    hidden = model.mask_token.expand(x.shape[0], restore.shape[1] - keep, -1)
    patches = torch.cat([x[:, 1:], hidden.to(x.dtype)], 1).gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
    x = torch.cat([x[:, :1], patches], 1) + model.decoder_pos_embed
    pred = model.decoder_pred(model.decoder_norm(transformer(model.decoder_blocks, x)))[:, 1:]
    mask = (restore >= keep).view(noise.shape)
    return masked_pixel_loss(pred, images, mask, model.patch_size, model.norm_pix, model.norm_window)


def our_loss(model: MAE, images: Tensor, mask: Tensor, keep: int) -> Tensor:
    """The loss as the trainer computes it, from a loader's mask (B, gh, gw) on; `keep` patches of an image are seen."""
    return model(images, Tiles.from_mask(mask, keep))[0]


def step(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: torch.device, dtype) -> None:
    """Forward, backward and AdamW."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        loss = loss_of()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(model="mae_vit_base_patch16")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = parser.parse_args()

    torch.manual_seed(0)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    model = create_model(args.model, image_size=args.image_size).to(device)
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    side = args.image_size // model.mask_unit
    noise = torch.rand(args.batch_size, side, side, device=device)
    keep = keep_count(side * side, model.mask_ratio)
    losses = {
        "ours": partial(our_loss, model, images, mask_from_noise(noise, keep), keep),
        "published": partial(published_loss, model, images, noise, keep),
    }
    with torch.no_grad():
        ours, theirs = (loss().item() for loss in losses.values())
    if abs(ours - theirs) > 1e-3 * theirs:
        sys.exit(f"the two formulations disagree: loss {ours} and {theirs}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    steps = {name: partial(step, loss, optimizer, device, dtype) for name, loss in losses.items()}
    peaks = {name: peak_mb(run, device) for name, run in steps.items()}
    times = interleaved(steps, args.rounds, device)
    found = {name: {**summary(times[name]), "peak_mb": peaks[name]} for name in steps}
    ratios = {
        "published_over_ours": found["published"]["median_s"] / found["ours"]["median_s"],
        "peak_ours_over_published": found["ours"]["peak_mb"] / found["published"]["peak_mb"],
    }
    print(f"{args.model}, B={args.batch_size}, {args.image_size} px, {args.dtype}:", machine(device))
    rows = [
        [name, f"{a['median_s'] * 1e3:.1f}", f"{a['q1_s'] * 1e3:.1f}-{a['q3_s'] * 1e3:.1f}", f"{a['peak_mb']:.0f}"]
        for name, a in found.items()
    ]
    print(markdown(["arm", "median ms", "quartiles ms", "peak MiB"], rows))
    print(f"loss {ours:.6f} and {theirs:.6f};", ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    if args.json:
        written = {"arms": found, "ratios": ratios, "losses": {"ours": ours, "published": theirs}}
        with open(args.json, "w") as file:
            json.dump({**written, "machine": machine(device), "settings": vars(args)}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
