"""How the figures of analyses look; colours as on the page of fcmae.compare."""

from __future__ import annotations

from collections.abc import Sized

from fcmae.comparison.figures import COLOURS

MAP = "viridis"


def figure(width: float, height: float):
    """An empty matplotlib figure of so many inches."""
    # Figure itself rather than pyplot: no global state, no display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def colours(subjects: Sized) -> list[str]:
    """One for each subject."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(subjects))]


def legend(figure, subjects: Sized) -> None:
    """The subjects' names over the figure."""
    figure.legend(loc="outside upper center", frameon=False, ncols=min(3, len(subjects)), fontsize=8)


def note(figure, text: str):
    """A line of explanation under the figure; the figure itself."""
    figure.supxlabel(text, fontsize=7, color="#444")
    return figure


def plain(figure):
    """No frame on two sides, faint lines across; the figure itself."""
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure


def panels(results: Sized, width: float = 3.4, height: float = 3.4, most: int = 4):
    """A figure with a place for each subject, `most` in a row, and those places."""
    columns = min(most, len(results))
    lines = -(-len(results) // columns)
    made = figure(width * columns, height * lines)
    axes = made.subplots(lines, columns, squeeze=False).flatten().tolist()
    for ax in axes[len(results) :]:
        ax.set_axis_off()
    return made, axes[: len(results)]


def tiled(maps, fill: float = float("nan")):
    """Maps (N, h, w) as one array, near a square of them, a gap between each two."""
    import numpy as np

    maps = np.asarray(maps, dtype=np.float64)
    count, h, w = maps.shape[:3]
    columns = int(np.ceil(count**0.5))
    lines, gap = -(-count // columns), max(1, round(0.06 * max(h, w)))
    sheet = np.full((lines * (h + gap) - gap, columns * (w + gap) - gap, *maps.shape[3:]), fill)
    for i, one in enumerate(maps):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = one
    return sheet
