"""How alike two networks represent the same images, layer by layer: linear CKA (arXiv 1905.00414 §3).

Features are flattened over positions and channels, not pooled: where something is belongs to what a layer says, and
linear CKA needs of two layers only the same images, so that maps and tokens of any sizes can be compared (as arXiv
2108.08810 does for ViTs and ResNets). Of each batch only the Gram matrices of its images are kept, in the unbiased
minibatch estimate of arXiv 2010.15327 §3.1, whose value does not depend on the batch size.
"""

from __future__ import annotations

from math import isnan

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.analysis import style
from fcmae.analysis.blocks import encode, rows, unknown_blocks, watched
from fcmae.analysis.subjects import Subject

PAIRS = True  # `measure` is given two subjects
LEAST = 4  # examples that the unbiased estimate needs
ENOUGH = 16  # examples below which even untrained networks look alike
CROPS = 9
ALIKE = 1e-12  # of a layer's own similarity, relative to its features: below it all examples are the same to it


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
    """CKA (layers of one, layers of two) of Gram matrices, for each batch those of both networks' layers. NaN where all
    examples are the same to a layer, as to one that has collapsed."""
    between, one, two, sizes = 0.0, 0.0, 0.0, [0.0, 0.0]
    for first, second in batches:
        between = between + torch.stack([torch.stack([hsic(k, l) for l in second]) for k in first])  # noqa: E741
        one = one + torch.stack([hsic(k, k) for k in first])
        two = two + torch.stack([hsic(l, l) for l in second])  # noqa: E741
        sizes = [
            size + torch.stack([k.square().mean() for k in part])
            for size, part in zip(sizes, (first, second), strict=True)
        ]
    one, two = (torch.where(own > ALIKE * size, own, torch.nan) for own, size in zip((one, two), sizes, strict=True))
    return between / (one[:, None] * two[None]).sqrt()


def refusal(subject: Subject) -> str | None:
    """Why it cannot be measured, if so."""
    return unknown_blocks(subject.network)


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
        "count": count,
        "rows": list(first.blocks),
        "columns": list(second.blocks),
        "values": [
            [None if isnan(value) else round(value, 6) for value in row] for row in minibatch_cka(batches).tolist()
        ],
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
        values = np.array(found["values"], dtype=float)  # None becomes NaN, which stays blank
        shown = ax.imshow(values, origin="lower", cmap=style.MAP, vmin=0, vmax=1, aspect="auto")
        ax.set_ylabel(f"blocks of {found['first']}")
        ax.set_xlabel(f"blocks of {found['second']}")
        ax.set_title(f"linear CKA, {found['examples']}", fontsize=9)
        for axis, names, turn in ((ax.xaxis, found["columns"], 90), (ax.yaxis, found["rows"], 0)):
            every = max(1, len(names) // 12)
            axis.set_ticks(list(range(0, len(names), every)), names[::every], rotation=turn, fontsize=7)
        figure.colorbar(shown, ax=ax)
    return figure


def say(name: str, found: dict) -> str:
    """What came out, in a line."""
    values = found["values"]
    known = [(v, i, j) for i, row in enumerate(values) for j, v in enumerate(row) if v is not None]
    if not known:
        return "nothing to compare: all examples are the same to every layer of one of them"
    best, last = max(known), values[-1][-1]
    said = (
        f"last blocks {'unknown' if last is None else f'{last:.3f}'}; most alike {best[0]:.3f}: {found['first']} "
        f"{found['rows'][best[1]]} and {found['second']} {found['columns'][best[2]]}; {found['examples']}"
    )
    few = (
        f" (fewer than {ENOUGH}: even untrained networks look alike; raise --count)" if found["count"] < ENOUGH else ""
    )
    return said + few
