"""How alike a ViT's position embeddings are: of each patch with all others (arXiv 2010.11929 §4.5, figure 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.analysis import style
from fcmae.analysis.subjects import Subject


def similarities(positions: Tensor) -> Tensor:
    """Cosine similarity (L, L) float64 of position embeddings (L, D)."""
    unit = F.normalize(positions.double(), dim=1)
    return unit @ unit.T


def positions_of(subject: Subject) -> Tensor | None:
    """The position embeddings of the patches, (L, D) on the CPU; None without such."""
    found = getattr(subject.network, "pos_embed", None)
    if subject.patch is None or not isinstance(found, Tensor) or found.ndim != 3:
        return None
    count = subject.grid[0] * subject.grid[1]
    return found.detach()[0, -count:].float().cpu() if found.shape[1] >= count else None


def refusal(subject: Subject) -> str | None:
    """Why it cannot be measured, if so."""
    return "it has no embedding for each position" if positions_of(subject) is None else None


def measure(subject: Subject, images: Tensor, settings) -> dict:
    """Similarities of each patch with all; the images have no part in it."""
    rows, columns = subject.grid
    found = similarities(positions_of(subject))
    near = [found[i, i + 1].item() for i in range(rows * columns - 1) if (i + 1) % columns]
    return {
        "grid": [rows, columns],
        "of_neighbours": sum(near) / len(near) if near else 1.0,
        "values": [[round(value, 5) for value in row] for row in found.tolist()],
    }


def draw(results: dict[str, dict]):
    """A grid of maps for each subject: each patch's similarities, at its place."""
    figure, axes = style.panels(results, 4.4, 4.2)
    for ax, (name, found) in zip(axes, results.items(), strict=True):
        rows, columns = found["grid"]
        maps = torch.tensor(found["values"]).reshape(rows, columns, rows, columns)
        sheet = torch.full((rows * (rows + 1) - 1, columns * (columns + 1) - 1), float("nan"))
        for r in range(rows):
            for c in range(columns):
                sheet[r * (rows + 1) :][:rows, c * (columns + 1) :][:, :columns] = maps[r, c]
        shown = ax.imshow(sheet.numpy(), cmap=style.MAP, vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(name, fontsize=9)
        ax.set_axis_off()
        figure.colorbar(shown, ax=ax, shrink=0.8, label="cosine similarity")
    return style.note(figure, "a tile for each patch, at its place: how alike its embedding is to those of all patches")


def say(name: str, found: dict) -> str:
    """What came out, in a line."""
    rows, columns = found["grid"]
    return f"{rows} x {columns} patches; neighbours in a row have a similarity of {found['of_neighbours']:.3f}"
