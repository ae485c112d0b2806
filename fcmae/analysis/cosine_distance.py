"""How alike the channels of an encoder are after each of its blocks (ConvNeXt V2, arXiv 2301.00808 §4, figure 4)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.analysis import style
from fcmae.analysis.blocks import blocks_of, encode, exact, mlps_of, rows, unknown_blocks, watched, widened

if TYPE_CHECKING:  # which needs fcmae.pretrain, which needs this
    from fcmae.analysis.subjects import Subject


def cosine_distance(x: Tensor) -> Tensor:
    """Of each image the mean distance of its channels, 1/C^2 sum_ij (1 - cos(X_i, X_j)) / 2, (B,) in float64.

    x: (B, P, C), channel i at P positions is X_i (arXiv 2301.00808 §4). A channel that is zero everywhere has cosine 0.
    """
    unit = F.normalize(exact(x), dim=1)
    return (1 - unit.sum(2).square().sum(1) / x.shape[2] ** 2) / 2  # the sum of all cosines is |sum of X_i/|X_i||^2


def cosine_distances(network: nn.Module, batches: Iterable[Tensor]) -> list[dict[str, object]]:
    """The mean cosine distance in each block of an encoder on whole images (B, C, H, W), from first to last, and its
    standard error over images: `distance` of what the block puts out, `widened` of what the second layer of its MLP
    takes, after GELU and GRN, where it has one. Of a ViT the patches' tokens, without the class token."""
    with torch.no_grad(), watching_distances(network) as found:
        for images in batches:
            encode(network, images)
    return found()


@contextmanager
def watching_distances(network: nn.Module) -> Iterator[Callable[[], list[dict[str, object]]]]:
    """The same of all that goes through the network until the block ends; what it gives is to be asked afterwards."""
    blocks, narrowing = blocks_of(network), mlps_of(network, "fc2")
    out: dict[str, list[float]] = {name: [] for name in blocks}
    wide: dict[str, list[float]] = {name: [] for name in narrowing}

    def see(name: str, x: Tensor) -> None:
        out[name] += cosine_distance(rows(network, x)).tolist()

    def see_wide(name: str, x: Tensor) -> None:
        wide[name] += cosine_distance(widened(network, narrowing[name], x)).tolist()

    def found() -> list[dict[str, object]]:
        return [{"layer": name} | _mean("distance", out[name]) | _mean("widened", wide.get(name)) for name in out]

    with watched(blocks, see), watched(narrowing, see_wide, inputs=True):
        yield found


def _mean(name: str, values: list[float] | None) -> dict[str, float]:
    if values is None:
        return {}
    error = "standard_error" if name == "distance" else f"{name}_standard_error"
    return {name: statistics.fmean(values), error: standard_error(values)}


def standard_error(values: list[float]) -> float:
    """Of their mean; 0 of a single one, which tells nothing of it."""
    return torch.tensor(values, dtype=torch.float64).std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0


def refusal(subject: Subject) -> str | None:
    """Why it cannot be measured, if so."""
    return unknown_blocks(subject.network)


def measure(subject: Subject, images: Tensor, settings) -> dict:
    """The distance after each block, from images (N, C, H, W)."""
    layers = cosine_distances(subject.network, subject.batches(images, settings.batch_size))
    return {"mean": statistics.fmean(layer["distance"] for layer in layers), "layers": layers}


def draw(results: dict[str, dict]):
    """One curve for each subject over the share of its depth."""
    figure = style.figure(9.0, 3.9)
    axes = figure.subplots(1, 2, sharey=True)
    panels = {"distance": "after each block", "widened": "in each block's MLP, after GELU (and GRN)"}
    for (name, found), colour in zip(results.items(), style.colours(results), strict=True):
        layers = found["layers"]
        for ax, key in zip(axes, panels, strict=True):
            points = [((i + 1) / len(layers), layer[key]) for i, layer in enumerate(layers) if key in layer]
            label = name if key == "distance" else None
            ax.plot(*zip(*points, strict=True) if points else ([], []), "-o", color=colour, linewidth=1.4,
                    markersize=3.5, label=label)  # fmt: skip
    for ax, title in zip(axes, panels.values(), strict=True):
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("depth: share of the encoder's blocks passed")
    axes[0].set_ylabel("mean pairwise cosine distance of channels")
    axes[0].set_ylim(bottom=0)
    style.legend(figure, results)
    return style.note(style.plain(figure), "0.5: channels that have nothing to do with each other; 0: all are the same")


def say(name: str, found: dict) -> str:
    """What came out, in a line."""
    said = []
    for key, place in (("distance", "after"), ("widened", "in the MLP of")):
        layers = [layer for layer in found["layers"] if key in layer]
        if layers:
            low, mean = min(layers, key=lambda layer: layer[key]), statistics.fmean(layer[key] for layer in layers)
            said.append(f"mean {mean:.3f}, lowest {low[key]:.3f} {place} {low['layer']}")
    return "; ".join(said)
