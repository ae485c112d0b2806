"""Effective receptive field: how much each pixel moves the encoder's output at the centre (arXiv 1701.04128 §2).

Of the whole image through the dense network, and of one whose masked regions do not exist, through the sparse encoder.
Where a block normalizes over all positions (GRN), or attends to all, every visible pixel has some influence. The
output is taken before a last LayerNorm: the sum of what that puts out hardly depends on anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fcmae.analysis import style
from fcmae.analysis.blocks import channels_last, encode, patch_grid, rows, sides
from fcmae.analysis.subjects import Subject
from fcmae.masking import draw_mask, grid_size
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.fcmae import FCMAE
from fcmae.models.mae import MAE
from fcmae.train.loop import tiles_of

RATIO = 0.6  # of the masked encoder's regions
SHARES = (0.5, 0.95)  # of the whole that the radii hold


@contextmanager
def without_last_norm(network: nn.Module) -> Iterator[None]:
    """The encoder puts out what its last LayerNorm, if it has one, is given, until the block ends."""
    norm = getattr(network, "norm", None)
    if not isinstance(norm, nn.LayerNorm):
        yield
        return
    handle = norm.register_forward_hook(lambda module, given, output: given[0])
    try:
        yield
    finally:
        handle.remove()


def influence(
    network: nn.Module, images: Tensor, mask: Tensor | None = None, batch_size: int = 16
) -> tuple[Tensor, tuple[float, float]]:
    """The mean over images of |d y / d x|, summed over image channels, (H, W) float64 on the CPU, and its centre.

    y: the sum over channels of the encoder's output at the centre, of a ViT's at the centre patch. images: (B, C, H,
    W), none of which may touch another's output. mask: (gh, gw) bool, True = masked, of all images and a
    MaskedAutoencoder; the centre must be visible.
    """
    size = tuple(images.shape[-2:])
    total = torch.zeros(size, dtype=torch.float64)
    for part in images.split(batch_size):
        x = part.clone().requires_grad_()
        with torch.enable_grad(), without_last_norm(network):
            if mask is None:
                output, grid = _encoded(network, x)
                at = centre_position(grid)
            else:
                output, grid, at = _sparse(network, x, mask)
            [gradient] = torch.autograd.grad(output[:, at].sum(), x)
        total += gradient.abs().sum((0, 1)).cpu().double()  # not every device has float64
    found = total / len(images)
    return found, centre_of(grid, size) if _is_patchwise(network) else _centroid(found)


def radii(field: Tensor, centre: tuple[float, float], shares: tuple[float, ...] = SHARES) -> list[float]:
    """Pixels from `centre`, (row, column), within which there are such shares of a field (H, W)."""
    h, w = field.shape
    far = torch.hypot(
        (torch.arange(h, dtype=torch.float64) + 0.5 - centre[0])[:, None].expand(h, w),
        (torch.arange(w, dtype=torch.float64) + 0.5 - centre[1])[None].expand(h, w),
    )
    order = far.flatten().argsort()
    inside = field.flatten()[order].cumsum(0)
    if not inside[-1] > 0:
        return [0.0 for _ in shares]
    places = torch.searchsorted(inside, inside[-1] * torch.tensor(shares, dtype=torch.float64))
    return far.flatten()[order][places.clamp(max=len(order) - 1)].tolist()


def centre_position(grid: tuple[int, int]) -> int:
    """Number of the position at the centre of a grid, row-major."""
    return grid[0] // 2 * grid[1] + grid[1] // 2


def centre_of(grid: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Row and column in pixels of the middle of that position over an image of (H, W) pixels."""
    return (grid[0] // 2 + 0.5) * size[0] / grid[0], (grid[1] // 2 + 0.5) * size[1] / grid[1]


def open_mask(masks: tuple[int, int], ratio: float, seed: int, grid: tuple[int, int]) -> Tensor:
    """A random mask (gh, gw) with the region at the centre of the encoder's grid visible: if it is not, it takes the
    place of one that is."""
    mask = torch.from_numpy(draw_mask(np.random.default_rng([seed, 0]), masks, ratio, "random")).clone()
    row, column = centre_of(grid, masks)
    at = int(row), int(column)
    if mask[at]:
        visible = (~mask).nonzero()[0]
        mask[tuple(visible)], mask[at] = True, False
    return mask


def _encoded(network: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The dense encoder's output as (B, P, C), and rows and columns of P; FCMAE's is a map (B, C, h, w), unlike what
    its blocks put out."""
    output = encode(network, x)
    if isinstance(network, FCMAE):
        return output.flatten(2).transpose(1, 2), tuple(output.shape[2:])
    return rows(network, output), sides(output, channels_last(network), patch_grid(network, tuple(x.shape[-2:])))


def _sparse(network: nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor, tuple[int, int], int]:
    """The encoder's output on the visible regions as (B, P, C), the whole grid, and which of P is its centre."""
    output = network.encode(x, tiles_of(mask.expand(len(x), -1, -1)).to(x.device))
    if not isinstance(network, MAE):
        grid = tuple(output.shape[2:])
        return output.flatten(2).transpose(1, 2), grid, centre_position(grid)
    grid = patch_grid(network, tuple(x.shape[-2:]))
    at = centre_position(grid)
    if not network.encoder_mask_tokens:
        times = network.mask_unit // network.patch_size
        kept = ~mask.repeat_interleave(times, 0).repeat_interleave(times, 1)
        at = int(kept.flatten()[:at].sum())
    return rows(network, output), grid, at


def _is_patchwise(network: nn.Module) -> bool:
    """Whether each output stands for one patch of the image: padded convolutions with strides shift what it sees."""
    stem = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    return isinstance(network, MaskedAutoencoder) or stem is None or stem.kernel_size == stem.stride


def _centroid(field: Tensor) -> tuple[float, float]:
    """The mean place of a field (H, W), in pixels."""
    h, w = field.shape
    share = field / field.sum().clamp(min=1e-300)
    rows_, columns = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (h, w))
    return (share.sum(1) @ rows_).item(), (share.sum(0) @ columns).item()


def refusal(subject: Subject) -> str | None:
    """Why it cannot be measured, if so."""
    return None


def measure(subject: Subject, images: Tensor, settings) -> dict:
    """Of the dense network, and where there is one the sparse encoder: the field over images (N, C, H, W) and the radii
    that hold half and 95 % of it."""
    size, images = subject.image_size, images.to(subject.device)
    with torch.no_grad():
        _, grid = _encoded(subject.network, images[:1])
    found = {"dense": influence(subject.network, images, None, settings.batch_size)}
    mask = None
    if subject.autoencoder is not None:
        masks = grid_size(size, subject.autoencoder.mask_unit)
        if 0 < int(masks[0] * masks[1] * (1 - RATIO)) < masks[0] * masks[1]:
            mask = open_mask(masks, RATIO, settings.seed, grid)
            found["sparse"] = influence(subject.network, images, mask, settings.batch_size)
    names = [f"radius_{share:.0%}" for share in SHARES]
    return {
        "image_size": list(size),
        "fields": {
            name: {"centre": list(centre)}
            | dict(zip(names, radii(field, centre), strict=True))
            | {"values": _rounded(field)}
            for name, (field, centre) in found.items()
        },
        "mask": None if mask is None else {"ratio": RATIO, "hidden": mask.int().tolist()},
    }


def _rounded(field: Tensor) -> list[list[float]]:
    """To four digits of the largest value; 0 stays 0."""
    return [[float(f"{value:.4g}") for value in row] for row in field.tolist()]


def draw(results: dict[str, dict]):
    """A picture for each field: the fourth root, so that little shows, with circles that hold 50 and 95 % of it."""
    from matplotlib.patches import Circle

    shown = {
        f"{name}, {kind}": (found, field) for name, found in results.items() for kind, field in found["fields"].items()
    }
    figure, axes = style.panels(shown, 3.2, 3.5)
    for ax, (title, (found, field)) in zip(axes, shown.items(), strict=True):
        values = np.asarray(field["values"])
        ax.imshow((values / max(values.max(), 1e-300)) ** 0.25, cmap="magma", vmin=0, vmax=1)
        near, far = (field[f"radius_{share:.0%}"] for share in SHARES)
        for radius, line in ((near, "-"), (far, "--")):
            row, column = field["centre"]
            ax.add_patch(Circle((column - 0.5, row - 0.5), radius, fill=False, color="white", linestyle=line))
        h, w = found["image_size"]
        ax.set_title(f"{title}, {h} x {w} px\n50 % within {near:.0f} px, 95 % within {far:.0f} px", fontsize=8)
        ax.set_axis_off()
    text = "fourth root of the influence of each pixel on the centre; circles hold 50 % (solid) and 95 % (dashed) of it"
    return style.note(figure, f"{text}\nsparse: {RATIO:.0%} of the regions hidden, which have none")


def say(name: str, found: dict) -> str:
    """What came out, in a line."""
    near, far = (f"radius_{share:.0%}" for share in SHARES)
    return "; ".join(
        f"{kind}: half of it within {field[near]:.1f} px, 95 % within {field[far]:.1f} px"
        for kind, field in found["fields"].items()
    )
