"""Frozen features of labelled images, and how well a nearest-neighbour vote and a linear probe tell the classes by
them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.data.loader import PatientLoader


def pooled(encoded: Tensor) -> Tensor:
    """One vector (B, D) an image: the mean over positions of a map (B, D, h, w) or tokens (B, 1 + L, D) but the first,
    the class token."""
    return encoded.mean((2, 3)) if encoded.ndim == 4 else encoded[:, 1:].mean(1)


@torch.no_grad()
def features(
    encoders: dict[Hashable, Callable[[Tensor], Tensor]],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> tuple[dict[Hashable, Tensor], Tensor, int]:
    """Of each encoder, which makes (B, D) of images, the features (N, D) in fp32 on the CPU; the labels (N,); how many
    images could not be read."""
    found: dict[Hashable, list[Tensor]] = {name: [] for name in encoders}
    labels, unreadable = [torch.empty(0, dtype=torch.int64)], 0
    for images, label in batches:
        read = label >= 0
        unreadable += int((~read).sum())
        if not read.any():
            continue
        images = images[read].to(device)
        labels.append(label[read])
        for name, encode in encoders.items():
            found[name].append(encode(images).float().cpu())
    return (
        {name: torch.cat(parts) if parts else torch.empty(0, 0) for name, parts in found.items()},
        torch.cat(labels),
        unreadable,
    )


def loader(dataset, batch_size: int, workers: int) -> PatientLoader:
    """Batches in the dataset's order."""
    # Its own generator: the loader would draw from the global one, whose state belongs to training.
    own = torch.Generator()
    return PatientLoader(dataset, batch_size, num_workers=workers, generator=own)


def knn(
    train: Tensor,
    labels: Tensor,
    val: Tensor,
    classes: int,
    neighbours: Sequence[int],
    temperature: float,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """For each number k of neighbours the class (M,) of each val feature (M, D): its k nearest of train (N, D) by
    cosine vote with the weight exp(cosine / temperature) (arXiv 1805.01978 §3.4); in float64 on a CPU."""
    device = torch.device(device)
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    train, val = (F.normalize(x.to(device, dtype), dim=1) for x in (train, val))
    labels, found = labels.to(device), {k: [] for k in neighbours}
    for part in val.split(max(1, 2**26 // len(train))):
        cosine, nearest = (part @ train.T).topk(min(max(neighbours), len(train)), dim=1)
        weight = ((cosine - cosine[:, :1]) / temperature).exp()
        for k, taken in found.items():
            votes = torch.zeros(len(part), classes, dtype=dtype, device=device)
            votes.scatter_add_(1, labels[nearest[:, :k]], weight[:, :k])
            taken.append(votes.argmax(1).cpu())
    return {k: torch.cat(taken) for k, taken in found.items()}


def probe(train: Tensor, labels: Tensor, val: Tensor, classes: int, decay: float) -> Tensor:
    """The class (M,) of each val feature (M, D) by logistic regression on train (N, D), features standardized.

    Full-batch L-BFGS in float64 from zeros: the same result every time.
    """
    train, val = train.double(), val.double()
    mean, std = train.mean(0), train.std(0).clamp_min(1e-12)
    weight, bias = logistic_regression((train - mean) / std, labels, classes, decay)
    return ((val - mean) / std @ weight + bias).argmax(1)


def logistic_regression(x: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Weight (D, classes) and bias (classes,) at the minimum of cross-entropy + decay / 2 * |W|^2 over x (N, D)."""
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def accuracy(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Share that is right, its standard error, and the mean over classes of each class's share."""
    right = (predicted == labels).double()
    top1 = right.mean().item()
    each = [right[labels == c].mean().item() for c in labels.unique()]
    error = (top1 * (1 - top1) / len(labels)) ** 0.5
    return {"top1": top1, "standard_error": error, "balanced": sum(each) / len(each)}
