"""Effective receptive field: how much each pixel moves the encoder's output at the centre (arXiv 1701.04128 §2).

Of the whole image through the dense network, and of one whose masked regions do not exist, through the sparse encoder.
Where a block normalizes over all positions (GRN), or attends to all, every visible pixel has some influence.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fcmae.analysis import style
from fcmae.analysis.blocks import encode, rows
from fcmae.analysis.subjects import Subject
from fcmae.masking import draw_mask, grid_size
from fcmae.models.fcmae import FCMAE
from fcmae.models.mae import MAE
from fcmae.train.loop import tiles_of

RATIO = 0.6  # of the masked encoder's regions
SHARES = (0.5, 0.95)  # of the whole that the radii hold


def influence(network: nn.Module, images: Tensor, mask: Tensor | None = None, batch_size: int = 16) -> Tensor:
    """The mean over images of |d y / d x|, summed over image channels, (H, W) float64 on the CPU.

    y: the sum over channels of the encoder's output at the centre, of a ViT's at the centre patch. images: (B, C, H,
    W), none of which may touch another's output. mask: (gh, gw) bool, True = masked, of all images and a
    MaskedAutoencoder; the centre must be visible.
    """
    total = torch.zeros(images.shape[-2:], dtype=torch.float64)
    for part in images.split(batch_size):
        x = part.clone().requires_grad_()
        with torch.enable_grad():
            if mask is None:
                output = _by_position(network, encode(network, x))
                at = _centre(output.shape[1], tuple(x.shape[-2:]))
            else:
                output, at = _sparse(network, x, mask)
            [gradient] = torch.autograd.grad(output[:, at].sum(), x)
        total += gradient.abs().sum((0, 1)).cpu().double()  # not every device has float64
    return total / len(images)


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


def centre_of(position: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Row and column in pixels of the middle of a position of a grid over an image of (H, W) pixels."""
    row, column = divmod(position, grid[1])
    return (row + 0.5) * size[0] / grid[0], (column + 0.5) * size[1] / grid[1]


def open_mask(grid: tuple[int, int], ratio: float, seed: int, size: tuple[int, int], positions: int) -> Tensor:
    """A random mask (gh, gw) with the region at the centre visible: if it is not, it takes the place of one that is."""
    mask = torch.from_numpy(draw_mask(np.random.default_rng([seed, 0]), grid, ratio, "random")).clone()
    row, column = centre_of(_centre(positions, size), _grid(positions, size), size)
    at = int(row * grid[0] / size[0]), int(column * grid[1] / size[1])
    if mask[at]:
        visible = (~mask).nonzero()[0]
        mask[tuple(visible)], mask[at] = True, False
    return mask


def _sparse(network, x: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    """The encoder's output on the visible regions as (B, P, C), and which of its positions is the centre."""
    size = tuple(x.shape[-2:])
    tiles = tiles_of(mask.expand(len(x), -1, -1)).to(x.device)
    output = _by_position(network, network.encode(x, tiles))
    if not isinstance(network, MAE) or network.encoder_mask_tokens:
        return output, _centre(output.shape[1], size)
    side = network.patch_size
    kept = ~mask.repeat_interleave(network.mask_unit // side, 0).repeat_interleave(network.mask_unit // side, 1)
    at = _centre(kept.numel(), size)
    return output, int(kept.flatten()[:at].sum())


def _by_position(network: nn.Module, features: Tensor) -> Tensor:
    """What `encode` gives as (B, P, C); FCMAE's is a map (B, C, h, w), unlike what its blocks put out."""
    return features.flatten(2).transpose(1, 2) if isinstance(network, FCMAE) else rows(network, features)


def _grid(positions: int, size: tuple[int, int]) -> tuple[int, int]:
    columns = round((positions * size[1] / size[0]) ** 0.5)
    return positions // columns, columns


def _centre(positions: int, size: tuple[int, int]) -> int:
    """Number of the position at the centre of a grid over an image of (H, W) pixels, row-major."""
    h, w = _grid(positions, size)
    return h // 2 * w + w // 2


def refusal(subject: Subject) -> str | None:
    """Why it cannot be measured, if so."""
    return None


def measure(subject: Subject, images: Tensor, settings) -> dict:
    """Of the dense network, and where there is one the sparse encoder: the field over images (N, C, H, W) and the radii
    that hold half and 95 % of it."""
    size, images = subject.image_size, images.to(subject.device)
    with torch.no_grad():
        positions = _by_position(subject.network, encode(subject.network, images[:1])).shape[1]
    centre = centre_of(_centre(positions, size), _grid(positions, size), size)
    found = {"dense": influence(subject.network, images, None, settings.batch_size)}
    mask = None
    if subject.autoencoder is not None:
        grid = grid_size(size, subject.autoencoder.mask_unit)
        if 0 < int(grid[0] * grid[1] * (1 - RATIO)) < grid[0] * grid[1]:
            mask = open_mask(grid, RATIO, settings.seed, size, positions)
            found["sparse"] = influence(subject.network, images, mask, settings.batch_size)
    return {
        "centre": list(centre),
        "mask": None if mask is None else {"ratio": RATIO, "hidden": mask.int().tolist()},
        "fields": {
            name: dict(zip((f"radius_{share:.0%}" for share in SHARES), radii(field, centre), strict=True))
            | {"values": _rounded(field)}
            for name, field in found.items()
        },
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
            row, column = found["centre"]
            ax.add_patch(Circle((column - 0.5, row - 0.5), radius, fill=False, color="white", linestyle=line))
        ax.set_title(f"{title}\n50 % within {near:.0f} px, 95 % within {far:.0f} px", fontsize=8)
        ax.set_axis_off()
    return figure


def say(name: str, found: dict) -> str:
    """What came out, in a line."""
    near, far = (f"radius_{share:.0%}" for share in SHARES)
    return "; ".join(
        f"{kind}: half of it within {field[near]:.1f} px, 95 % within {field[far]:.1f} px"
        for kind, field in found["fields"].items()
    )
