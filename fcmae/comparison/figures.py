"""The report's figures, as SVG that stands inside an HTML page."""

from __future__ import annotations

import io
import re

COLOURS = ("#1f6fb4", "#d9661f", "#2f8f4e", "#8a4fb0", "#b8323c", "#6b6b6b")
THIN = {"elinewidth": 0.8, "ecolor": "#444"}


def loss_curves(arms: dict[str, dict]) -> str:
    """Loss against steps and against seconds of training, one axis for all arms: each step faint, the mean solid."""
    figure = _figure(9.6, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    for (name, arm), colour in zip(arms.items(), _colours(arms), strict=True):
        curve = arm["curve"]
        for ax, key in zip(axes, ("step", "seconds"), strict=True):
            ax.plot(curve[key], curve["loss"], color=colour, alpha=0.2, linewidth=0.7)
            ax.plot(curve[key], curve["smooth"], color=colour, linewidth=1.6, label=name)
    axes[0].set_xlabel("optimizer step")
    axes[1].set_xlabel("seconds of training")
    axes[0].set_ylabel("loss on masked pixels")
    axes[0].legend(frameon=False)
    return _svg(figure, "Loss of each arm against steps and against seconds of training")


def accuracies(arms: dict[str, dict]) -> str:
    """kNN and probe accuracy on the validation images, bars of the trained arm and of its random initialisation."""
    figure = _figure(4.7, 3.3)
    ax = figure.subplots()
    width, places = 0.8 / (2 * len(arms)), range(2)
    for i, ((name, arm), colour) in enumerate(zip(arms.items(), _colours(arms), strict=True)):
        for j, (state, label, alpha) in enumerate((("trained", name, 1.0), ("random", None, 0.35))):
            at = [p + (2 * i + j + 0.5 - len(arms)) * width for p in places]
            found = [arm["representation"][state][kind] for kind in ("knn", "probe")]
            errors, top1 = ([100 * f[key] for f in found] for key in ("standard_error", "top1"))
            bars = ax.bar(at, top1, 0.92 * width, yerr=errors, color=colour, alpha=alpha, label=label, error_kw=THIN)
            ax.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    ax.set_xticks(list(places), ["kNN", "linear probe"])
    ax.set_ylabel("accuracy, % (pale: random initialisation)")
    ax.margins(y=0.15)
    figure.legend(loc="outside upper center", frameon=False, ncols=len(arms), fontsize=8)
    return _svg(figure, "kNN and linear probe accuracy of each arm and of its random initialisation")


def distances(arms: dict[str, dict]) -> str:
    """Mean cosine distance of channels after each block, trained solid and at random initialisation dashed."""
    figure = _figure(4.7, 3.3)
    ax = figure.subplots()
    for (name, arm), colour in zip(arms.items(), _colours(arms), strict=True):
        for state, line in (("trained", "-o"), ("random", "--")):
            layers = [layer["distance"] for layer in arm["representation"][state]["cosine_distance"]["layers"]]
            share = [(i + 1) / len(layers) for i in range(len(layers))]
            label = name if state == "trained" else None
            ax.plot(share, layers, line, color=colour, linewidth=1.3, markersize=3, label=label)
    ax.plot([], [], "--", color="#555", label="random initialisation")
    ax.set_xlabel("depth: share of the encoder's blocks passed")
    ax.set_ylabel("cosine distance")
    figure.legend(loc="outside upper center", frameon=False, ncols=len(arms) + 1, fontsize=8)
    return _svg(figure, "Mean cosine distance of channels after each block of the encoder")


def _colours(arms: dict) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(arms))]


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure, title: str) -> str:
    """The figure as an SVG element: its text stays text, and nothing in it points outside."""
    from matplotlib import rc_context

    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        ax.set_axisbelow(True)
    buffer = io.StringIO()
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    with rc_context(style):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # names of formats; HTML knows them
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
