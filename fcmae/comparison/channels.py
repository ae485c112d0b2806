"""How alike the channels of an encoder are, without training it further."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.norms import GRN

_BLOCK = re.compile(r"(?:encoder\.stages\.(\d+)\.)?blocks\.(\d+)")


def dense(model: MaskedAutoencoder) -> MaskedAutoencoder:
    """The model ready to encode whole images: GRN pools over each image, as in fine-tuning, however it was trained."""
    for module in model.modules():
        if isinstance(module, GRN):
            module.mode = "per_image"
    return model.eval()


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
