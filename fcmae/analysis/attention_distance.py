"""How far a ViT's heads look (arXiv 2010.11929 §4.5, appendix D.7, figure 11)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fcmae.analysis import style
from fcmae.analysis.blocks import encode, prefix_tokens, watched
from fcmae.analysis.subjects import Subject


def patch_distances(grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Pixels between the centres of every two patches, (L, L) float64, row-major; grid: rows and columns of patches."""
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64) * patch[0],
        torch.arange(grid[1], dtype=torch.float64) * patch[1],
        indexing="ij",
    )
    places = torch.stack([rows.flatten(), columns.flatten()], 1)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(weights: Tensor, distances: Tensor, prefix: int) -> Tensor:
    """Of each image and head the mean over queries of sum_j a_ij d_ij in pixels, (B, heads).

    weights: attention (B, heads, N, N), rows of sum 1. The first `prefix` tokens, which stand for no place, are left
    out as queries and as keys, and what is left of a row is brought back to a sum of 1. distances: (L, L), L = N -
    prefix.
    """
    among = weights[:, :, prefix:, prefix:].double()
    # A patch that looks at nothing but the class token has no distance: it counts as looking at itself.
    among = among / among.sum(-1, keepdim=True).clamp(min=1e-30)
    return (among * distances).sum(-1).mean(-1)


def attentions_of(network: nn.Module) -> dict[str, nn.Module]:
    """The attention of each of timm's plain ViT blocks, first to last."""
    blocks = getattr(network, "blocks", None)
    found = (
        [getattr(block, "attn", None) for block in blocks] if isinstance(blocks, (nn.Sequential, nn.ModuleList)) else []
    )
    # SAM's adds positions to its weights, and sees windows.
    plain = (type(a).__name__ == "Attention" and hasattr(a, "q_norm") and not hasattr(a, "use_rel_pos") for a in found)
    if not found or not all(plain):
        return {}
    return {f"block {i + 1}": attention for i, attention in enumerate(found)}


@torch.no_grad()
def attention_distances(network: nn.Module, batches, distances: Tensor) -> dict[str, list[list[float]]]:
    """Of each block and head the distance on each image, layers[name][head][image], of whole images (B, C, H, W).

    The weights are computed from the queries and keys that attention makes, softmax(q k^T * scale), whether or not it
    is fused: `q_norm` and `k_norm`, which may be identities, are where both can be seen.
    """
    attentions, prefix = attentions_of(network), prefix_tokens(network)
    queries: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {name: [] for name in attentions}

    def see_keys(name: str, keys: Tensor) -> None:
        scaled = queries.pop(name).float() @ keys.float().transpose(-2, -1) * attentions[name].scale
        found[name].append(attention_distance(scaled.softmax(-1).cpu(), distances, prefix))

    with (
        watched({name: a.q_norm for name, a in attentions.items()}, queries.__setitem__),
        watched({name: a.k_norm for name, a in attentions.items()}, see_keys),
    ):
        for images in batches:
            encode(network, images)
    return {name: torch.cat(parts).T.tolist() for name, parts in found.items()}


def refusal(subject: Subject) -> str | None:
    """Why it cannot be measured, if so."""
    return None if subject.patch and attentions_of(subject.network) else "it is no ViT with plain self-attention"


def measure(subject: Subject, images: Tensor, settings) -> dict:
    """The mean over images (N, C, H, W) of each head's distance in pixels, and that of uniform attention."""
    distances = patch_distances(subject.grid, subject.patch)
    found = attention_distances(subject.network, subject.batches(images, settings.batch_size), distances)
    return {
        "patch": list(subject.patch),
        "uniform": distances.mean().item(),
        "layers": [
            {"layer": name, "heads": [sum(each) / len(each) for each in heads]} for name, heads in found.items()
        ],
    }


def draw(results: dict[str, dict]):
    """A panel for each subject: a dot for each head over the blocks."""
    figure, axes = style.panels(results, 3.6, 3.2)
    for ax, (name, found), colour in zip(axes, results.items(), style.colours(results), strict=True):
        for i, layer in enumerate(found["layers"]):
            ax.plot([i + 1] * len(layer["heads"]), layer["heads"], "o", color=colour, markersize=4, alpha=0.75)
        ax.axhline(found["uniform"], color="#555", linestyle="--", linewidth=1, label="uniform attention")
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("block")
        ax.set_ylabel("mean attention distance, pixels")
        ax.set_xticks(range(1, len(found["layers"]) + 1))
        ax.tick_params(axis="x", labelsize=7)
        ax.set_ylim(0, 1.12 * max(found["uniform"], *(d for layer in found["layers"] for d in layer["heads"])))
        ax.legend(frameon=False, fontsize=7, loc="lower right")
    return style.note(style.plain(figure), "a dot for each head: pixels between patches, weighted by its attention")


def say(name: str, found: dict) -> str:
    """What came out, in a line."""
    first, last = (sum(layer["heads"]) / len(layer["heads"]) for layer in (found["layers"][0], found["layers"][-1]))
    every = [distance for layer in found["layers"] for distance in layer["heads"]]
    return (
        f"{first:.1f} px in the first block, {last:.1f} in the last; heads from {min(every):.1f} to {max(every):.1f} "
        f"(uniform: {found['uniform']:.1f})"
    )
