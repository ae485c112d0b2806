"""Feature maps of one image, and channels that say nothing: dead and saturated ones (arXiv 2301.00808 §4, figure 3).

Measured where the paper saw them, in the MLP of a block after its expansion and GELU, before GRN: GRN's gamma and
beta move every channel off zero and would hide what it is there to mend. And at the block's output, which the next
block sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fcmae.analysis import style
from fcmae.analysis.blocks import (
    activation_of,
    blocks_of,
    channels_last,
    encode,
    exact,
    mlps_of,
    rows,
    sides,
    unknown_blocks,
    watched,
    widened,
)

if TYPE_CHECKING:  # which needs fcmae.pretrain, which needs this
    from fcmae.analysis.subjects import Subject

# Over all positions of all images. Dead: its root mean square is less than this share of the mean of the layer's
# channels: against its neighbours it is zero everywhere, and so small that no difference in it matters.
DEAD = 0.01
# Saturated: not dead, and its standard deviation is less than this share of its mean's magnitude: it is on everywhere
# at one level, and a map of it is a uniform square. After GELU a channel that tells places apart varies by as much as
# its mean or more.
SATURATED = 0.1
SHOWN = 64  # channels of a layer's picture, those of the largest root mean square of every layer


class Channels:
    """Running moments of a layer's channels over positions of images, in float64."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Count (B, P, C)."""
        x = exact(x.flatten(0, -2))
        self.count += len(x)
        self.sum, self.squares = self.sum + x.sum(0), self.squares + x.square().sum(0)

    def mean_std_rms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each channel (C,)."""
        mean, square = self.sum / self.count, self.squares / self.count
        return mean, (square - mean.square()).clamp(min=0).sqrt(), square.sqrt()


def silent_channels(mean: Tensor, std: Tensor, rms: Tensor) -> tuple[Tensor, Tensor]:
    """Which channels are dead and which saturated, each (C,) bool, from their moments over positions of images."""
    dead = rms <= DEAD * rms.mean()
    return dead, ~dead & (std < SATURATED * mean.abs())


def channel_states(network: nn.Module, batches: Iterable[Tensor]) -> list[dict]:
    """Of each block, from first to last: channels, dead and saturated ones of its expansion (`widened`) where it has
    one, and of its output (`output`), on whole images."""
    with torch.no_grad(), watching_channels(network) as found:
        for images in batches:
            encode(network, images)
    return found()


@contextmanager
def watching_channels(network: nn.Module, outputs: bool = True) -> Iterator[Callable[[], list[dict]]]:
    """The same of all that goes through the network until the block ends; what it gives is to be asked afterwards.
    outputs: whether the blocks' outputs are looked at too."""
    blocks, widening = blocks_of(network), mlps_of(network, "fc1")
    wide, out = {name: Channels() for name in widening}, {name: Channels() for name in blocks if outputs}

    def see_wide(name: str, x: Tensor) -> None:
        wide[name].add(widened(network, widening[name], activation_of(blocks[name])(x)))

    def found() -> list[dict]:
        of = (("widened", wide), ("output", out))
        return [{"layer": name} | {key: _counted(c[name]) for key, c in of if name in c} for name in blocks]

    with (
        watched(widening, see_wide),
        watched({name: blocks[name] for name in out}, lambda name, x: out[name].add(rows(network, x))),
    ):
        yield found


def _counted(channels: Channels) -> dict:
    dead, saturated = silent_channels(*channels.mean_std_rms())
    return {"channels": len(dead), "dead": int(dead.sum()), "saturated": int(saturated.sum())}


def refusal(subject: Subject) -> str | None:
    """Why it cannot be measured, if so."""
    return unknown_blocks(subject.network)


def measure(subject: Subject, images: Tensor, settings) -> dict:
    """Counts over images (N, C, H, W), and the first image's maps after the last block of each stage, or of every
    third of a network without stages."""
    layers = channel_states(subject.network, subject.batches(images, settings.batch_size))
    return {
        "dead_if": f"rms <= {DEAD} of the mean rms of the layer's channels",
        "saturated_if": f"not dead and std < {SATURATED} of |mean|",
        "layers": layers,
        "maps": _maps(subject, images[:1].to(subject.device)),
    }


@torch.no_grad()
def _maps(subject: Subject, image: Tensor) -> dict[str, dict]:
    blocks, widening = subject.blocks, mlps_of(subject.network, "fc1")
    last = {name.rpartition(" block")[0]: name for name in blocks}  # of each stage
    names = list(last.values())
    if len(names) == 1:
        every = list(blocks)
        names = [every[round((i + 1) / 4 * len(every)) - 1] for i in range(4)] if len(every) > 3 else every
    found: dict[str, tuple[Tensor, tuple[int, int]]] = {}

    def see(name: str, x: Tensor) -> None:
        last = not isinstance(widening[name], nn.Conv2d) if name in widening else channels_last(subject.network)
        shape = sides(x, last, subject.grid)
        if name in widening:
            x = widened(subject.network, widening[name], activation_of(blocks[name])(x))
        else:
            x = rows(subject.network, x)
        found[name] = x[0].float().cpu(), shape

    with watched({name: widening.get(name, blocks[name]) for name in names}, see):
        encode(subject.network, image)
    return {name: _map(*one) for name, one in found.items()}


def _map(x: Tensor, shape: tuple[int, int]) -> dict:
    """The strongest channels of (P, C) as maps of P = rows x columns, to four digits of the largest magnitude."""
    chosen = x.square().mean(0).argsort(descending=True)[:SHOWN].sort().values
    maps = x[:, chosen].T.reshape(len(chosen), *shape)
    digits = 4 - int(maps.abs().max().clamp(min=1e-30).log10().floor())
    return {"channels": chosen.tolist(), "values": [[[round(v, digits) for v in r] for r in m] for m in maps.tolist()]}


def draw(results: dict[str, dict]):
    """A row for each subject: the strongest maps of some blocks, and the share of dead and saturated channels."""
    most = max(len(found["maps"]) for found in results.values())
    figure = style.figure(2.3 * most + 3.4, 2.6 * len(results))
    axes = figure.subplots(len(results), most + 1, squeeze=False, width_ratios=[1] * most + [1.4])
    for row, (name, found) in zip(axes, results.items(), strict=True):
        for ax in row[:-1]:
            ax.set_axis_off()
        for ax, (layer, maps) in zip(row, found["maps"].items(), strict=False):
            ax.imshow(style.tiled(maps["values"]), cmap=style.MAP)
            ax.set_title(layer, fontsize=8)
        row[0].set_title(f"{name}\n{row[0].get_title()}", fontsize=8)
        _shares(row[-1], found["layers"])
    what = f"the {SHOWN} strongest channels after GELU, or of a block without it, on one image, all in one colour scale"
    dead = f"dead: rms up to {DEAD:.0%} of the layer's mean rms; saturated: std less than {SATURATED:.0%} of the mean"
    return style.note(figure, f"{what}\n{dead}")


def _shares(ax, layers: list[dict]) -> None:
    for key, line in (("widened", "-o"), ("output", ":")):
        here = [(i, layer[key]) for i, layer in enumerate(layers) if key in layer]
        for kind, colour in (("dead", style.COLOURS[4]), ("saturated", style.COLOURS[1])):
            points = [((i + 1) / len(layers), 100 * of[kind] / of["channels"]) for i, of in here]
            if points:
                ax.plot(*zip(*points, strict=True), line, color=colour, markersize=3, linewidth=1.2,
                        label=f"{kind}, {'after GELU' if key == 'widened' else 'block output'}")  # fmt: skip
    ax.set_ylabel("% of channels", fontsize=8)
    ax.set_xlabel("depth: share of the blocks passed", fontsize=8)
    ax.set_ylim(-2, 102)
    ax.legend(frameon=False, fontsize=6)


def say(name: str, found: dict) -> str:
    """What came out, in a line."""
    said = []
    for key, place in (("widened", "after GELU"), ("output", "at the blocks' outputs")):
        here = [layer[key] for layer in found["layers"] if key in layer]
        if here:
            total = sum(of["channels"] for of in here)
            dead, saturated = (sum(of[kind] for of in here) for kind in ("dead", "saturated"))
            said.append(f"{place} {dead} dead and {saturated} saturated of {total} channels")
    return ", ".join(said)
