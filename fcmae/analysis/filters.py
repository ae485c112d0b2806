"""What a network's first layer looks for, and of a ViT the principal components of it (arXiv 2010.11929, figure 7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fcmae.analysis import style
from fcmae.analysis.subjects import Subject

SHOWN = 64  # filters, the largest
COMPONENTS = 28  # as in the paper's figure


def first_filters(network: nn.Module, in_chans: int) -> Tensor | None:
    """The weight (D, C, k, k) of the first convolution on the image, float32 on the CPU; None without one."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == in_chans and module.groups == 1:
            return module.weight.detach().float().cpu()
    return None


def principal_components(filters: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The directions (count, C, k, k) in which filters (D, C, k, k) differ most from their mean, of length 1, and the
    share of the filters' variance along each (count,)."""
    flat = filters.flatten(1).double()
    _, lengths, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    shares = lengths.square() / lengths.square().sum().clamp(min=1e-300)
    return directions[:count].reshape(-1, *filters.shape[1:]), shares[:count]


def shown_filters(filters: Tensor) -> Tensor:
    """Filters (N, C, k, k) as pixels (N, k, k, 3) in [0, 1], each by its own extremes; one channel grey, of more than
    three the first three."""
    filters = filters[:, :3] if filters.shape[1] >= 3 else filters[:, :1].expand(-1, 3, -1, -1)
    low, high = (f(filters.flatten(1), 1).values[:, None, None, None] for f in (torch.min, torch.max))
    return ((filters - low) / (high - low).clamp(min=1e-12)).permute(0, 2, 3, 1)


def refusal(subject: Subject) -> str | None:
    """Why it cannot be measured, if so."""
    found = first_filters(subject.network, subject.in_chans)
    return "its first layer is no convolution on the image" if found is None else None


def measure(subject: Subject, images: Tensor, settings) -> dict:
    """The filters of largest norm, and of a ViT the principal components of all; the images have no part in it."""
    filters = first_filters(subject.network, subject.in_chans)
    order = filters.flatten(1).norm(dim=1).argsort(descending=True)[:SHOWN].sort().values
    found = {"filters": len(filters), "shape": list(filters.shape[1:]), "shown": order.tolist()}
    found["values"] = _digits(filters[order])
    if subject.patch:
        directions, shares = principal_components(filters, COMPONENTS)
        found["components"] = {"variance_share": shares.tolist(), "values": _digits(directions)}
    return found


def _digits(x: Tensor) -> list:
    """To five digits of the largest magnitude."""
    digits = 5 - int(x.abs().max().clamp(min=1e-30).log10().floor())
    return (x.double() * 10**digits).round().div(10**digits).tolist()


def draw(results: dict[str, dict]):
    """A sheet for each subject's filters, and one for a ViT's principal components."""
    shown = {}
    for name, found in results.items():
        shown[f"{name}:\n{len(found['shown'])} of {found['filters']} filters"] = found["values"]
        if "components" in found:
            share = sum(found["components"]["variance_share"])
            components = found["components"]["values"]
            shown[f"{name}:\n{len(components)} components, {share:.0%} of the variance"] = components
    figure, axes = style.panels(shown, 3.4, 3.6)
    for ax, (title, values) in zip(axes, shown.items(), strict=True):
        ax.imshow(style.tiled(shown_filters(torch.tensor(values)).numpy(), fill=1.0), interpolation="nearest")
        ax.set_title(title, fontsize=8)
        ax.set_axis_off()
    return figure


def say(name: str, found: dict) -> str:
    """What came out, in a line."""
    said = f"{found['filters']} filters of {' x '.join(map(str, found['shape']))}"
    if "components" in found:
        shares = found["components"]["variance_share"]
        held = f"{sum(shares[:3]):.0%}, the first {len(shares)} {sum(shares):.0%}"
        said += f"; of their variance the first 3 principal components hold {held}"
    return said
