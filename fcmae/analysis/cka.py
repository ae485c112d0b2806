"""How alike two networks represent the same images, layer by layer: linear CKA (arXiv 1905.00414 §3).

Features are flattened over positions and channels, not pooled: where something is belongs to what a layer says, and
linear CKA needs of two layers only the same images, so that maps and tokens of any sizes can be compared (as arXiv
2108.08810 does for ViTs and ResNets). Of each batch only the Gram matrices of its images are kept, in the unbiased
minibatch estimate of arXiv 2010.15327 §3.1, whose value does not depend on the batch size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.analysis import style
from fcmae.analysis.blocks import encode, rows, watched
from fcmae.analysis.subjects import Subject

PAIRS = True  # `measure` is given two subjects
LEAST = 4  # examples that the unbiased estimate needs
CROPS = 9


def gram(x: Tensor) -> Tensor:
    """Inner products (B, B) in float64 of the features of B examples, (B, ...)."""
    x = x.flatten(1).cpu().double()
    return x @ x.T


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - the paper's letters
    """The unbiased estimate HSIC_1 of two Gram matrices (n, n), n > 3 (arXiv 2010.15327, equation 3)."""
    n = len(k)
    k, l = (m - torch.diag(m.diagonal()) for m in (k, l))  # noqa: E741
    terms = (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) * l.sum(0)).sum()
    return terms / (n * (n - 3))


def minibatch_cka(batches: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    """CKA (layers of one, layers of two) of Gram matrices, for each batch those of both networks' layers."""
    between, one, two = 0.0, 0.0, 0.0
    for first, second in batches:
        between = between + torch.stack([torch.stack([hsic(k, l) for l in second]) for k in first])  # noqa: E741
        one = one + torch.stack([hsic(k, k) for k in first])
        two = two + torch.stack([hsic(l, l) for l in second])  # noqa: E741
    return between / (one[:, None] * two[None]).clamp(min=1e-300).sqrt()


def refusal(subject: Subject) -> str | None:
    """Why it cannot be measured, if so."""
    return None if subject.blocks else "it has no blocks under known names (ConvNeXt, ViT, Swin, ResNet, EfficientNet)"


def measure(first: Subject, second: Subject, images: tuple[Tensor, Tensor], settings) -> dict:
    """CKA between all blocks of two subjects; images: (N, C, H, W) of each, the same ones in the same order. Of fewer
    than four images nine crops each are the examples."""
    count = len(images[0])
    examples = f"{count} images"
    if count < LEAST:
        images, examples = tuple(crops(part) for part in images), f"{CROPS} crops of each of {count} images"
    parts = max(1, len(images[0]) // max(LEAST, settings.batch_size))
    batches = [
        (_grams(first, one), _grams(second, two))
        for one, two in zip(*(part.tensor_split(parts) for part in images), strict=True)
    ]
    return {
        "first": first.label,
        "second": second.label,
        "examples": examples,
        "rows": list(first.blocks),
        "columns": list(second.blocks),
        "values": [[round(value, 6) for value in row] for row in minibatch_cka(batches).tolist()],
    }


def crops(images: Tensor) -> Tensor:
    """Nine crops of three quarters of each side, at the corners, edges and centre, brought back to the full size."""
    h, w = images.shape[-2:]
    tall, wide = 3 * h // 4, 3 * w // 4
    found = [
        images[..., top : top + tall, left : left + wide]
        for top in (0, (h - tall) // 2, h - tall)
        for left in (0, (w - wide) // 2, w - wide)
    ]
    return F.interpolate(torch.cat(found), size=(h, w), mode="bilinear", antialias=True)


@torch.no_grad()
def _grams(subject: Subject, images: Tensor) -> list[Tensor]:
    found: dict[str, Tensor] = {}
    with watched(subject.blocks, lambda name, x: found.update({name: gram(rows(subject.network, x))})):
        encode(subject.network, images.to(subject.device))
    return list(found.values())


def draw(results: dict[str, dict]):
    """A heat map: blocks of the second subject over those of the first."""
    figure, axes = style.panels(results, 5.4, 4.6)
    for ax, found in zip(axes, results.values(), strict=True):
        shown = ax.imshow(found["values"], origin="lower", cmap=style.MAP, vmin=0, vmax=1, aspect="auto")
        ax.set_ylabel(f"blocks of {found['first']}")
        ax.set_xlabel(f"blocks of {found['second']}")
        ax.set_title(f"linear CKA, {found['examples']}", fontsize=9)
        for axis, count in ((ax.xaxis, len(found["columns"])), (ax.yaxis, len(found["rows"]))):
            every = max(1, count // 12)
            axis.set_ticks(list(range(0, count, every)), [str(i + 1) for i in range(0, count, every)])
        figure.colorbar(shown, ax=ax)
    return figure


def say(name: str, found: dict) -> str:
    """What came out, in a line."""
    values = found["values"]
    best = max(((v, i, j) for i, row in enumerate(values) for j, v in enumerate(row)), key=lambda each: each[0])
    return (
        f"last blocks {values[-1][-1]:.3f}; most alike {best[0]:.3f}: {found['first']} {found['rows'][best[1]]} and "
        f"{found['second']} {found['columns'][best[2]]}"
    )
