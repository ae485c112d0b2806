"""What encoders have learned, without training them further: kNN, a linear probe, and how alike channels are."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fcmae.errors import UsageError
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.norms import GRN

_BLOCK = re.compile(r"(?:encoder\.stages\.(\d+)\.)?blocks\.(\d+)")


def dense(model: MaskedAutoencoder) -> MaskedAutoencoder:
    """The model ready to encode whole images: GRN pools over each image, as in fine-tuning, however it was trained."""
    for module in model.modules():
        if isinstance(module, GRN):
            module.mode = "per_image"
    return model.eval()


def pooled(encoded: Tensor) -> Tensor:
    """One vector (B, D) an image: the mean over positions of a map (B, D, h, w) or tokens (B, 1 + L, D) but the first,
    the class token."""
    return encoded.mean((2, 3)) if encoded.ndim == 4 else encoded[:, 1:].mean(1)


@torch.no_grad()
def features(
    models: dict[str, MaskedAutoencoder], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[dict[str, Tensor], Tensor, int]:
    """Of each model (N, D) pooled features in fp32 on the CPU; the labels (N,); how many images could not be read.

    Raises UsageError when none could.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    labels, unreadable = [], 0
    for images, label in batches:
        read = label >= 0
        unreadable += int((~read).sum())
        if not read.any():
            continue
        images = images[read].to(device)
        labels.append(label[read])
        for name, model in models.items():
            found[name].append(pooled(model.encode(images)).float().cpu())
    if not labels:
        raise UsageError(f"none of the {unreadable} labelled images of a split can be read; mend data.labelled")
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(labels), unreadable


def loader(dataset, batch_size: int, workers: int) -> DataLoader:
    """Batches in the dataset's order."""
    return DataLoader(dataset, batch_size, num_workers=workers)


def knn(train: Tensor, labels: Tensor, val: Tensor, classes: int, neighbours: int, temperature: float) -> Tensor:
    """The class (M,) of each val feature (M, D): its `neighbours` nearest of train (N, D) by cosine vote with the
    weight exp(cosine / temperature) (arXiv 1805.01978 §3.4)."""
    train, val = F.normalize(train.double(), dim=1), F.normalize(val.double(), dim=1)
    found = []
    for part in val.split(1024):
        cosine, nearest = (part @ train.T).topk(min(neighbours, len(train)), dim=1)
        votes = torch.zeros(len(part), classes, dtype=torch.float64)
        votes.scatter_add_(1, labels[nearest], ((cosine - cosine[:, :1]) / temperature).exp())
        found.append(votes.argmax(1))
    return torch.cat(found)


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


def cosine_distance(x: Tensor) -> Tensor:
    """Of each image the mean distance of its channels, 1/C^2 sum_ij (1 - cos(X_i, X_j)) / 2, (B,) in float64.

    x: (B, P, C), channel i at P positions is X_i (arXiv 2301.00808 §4). A channel that is zero everywhere has cosine 0.
    """
    unit = F.normalize(x.double(), dim=1)
    return (1 - unit.sum(2).square().sum(1) / x.shape[2] ** 2) / 2  # the sum of all cosines is |sum of X_i/|X_i||^2


@torch.no_grad()
def cosine_distances(model: MaskedAutoencoder, images: Tensor, batch_size: int) -> list[dict[str, object]]:
    """The mean cosine distance after each block of the encoder on whole images (B, C, H, W), from first to last.

    Of a ViT the patches' tokens, without the class token.
    """
    layers = {name: module for name, module in model.named_modules() if _BLOCK.fullmatch(name)}
    sums = dict.fromkeys(layers, 0.0)

    def watch(name: str):
        def hook(module: nn.Module, inputs, output: Tensor) -> None:
            x = output.flatten(1, 2) if output.ndim == 4 else output[:, 1:]
            sums[name] += cosine_distance(x.cpu()).sum().item()  # not every device has float64

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        for part in images.split(batch_size):
            model.encode(part)
    finally:
        for handle in handles:
            handle.remove()
    return [{"layer": _label(name), "distance": total / len(images)} for name, total in sums.items()]


def _label(name: str) -> str:
    stage, block = _BLOCK.fullmatch(name).groups()
    return f"block {int(block) + 1}" if stage is None else f"stage {int(stage) + 1} block {int(block) + 1}"
