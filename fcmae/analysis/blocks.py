"""The blocks of an encoder, this toolkit's or timm's, and watching what goes through them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.masking import grid_size
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.mae import MAE
from fcmae.models.norms import GRN

_BLOCK = re.compile(
    r"(?:encoder\.)?(?:(?:stages|layers)\.(\d+)\.)?blocks\.(\d+)"  # ConvNeXt, ViT, Swin
    r"|blocks\.(\d+)\.(\d+)|layer(\d+)\.(\d+)"  # EfficientNet; ResNet
)


def dense(model: MaskedAutoencoder) -> MaskedAutoencoder:
    """The model ready to encode whole images: GRN pools over each image, as in fine-tuning, however it was trained."""
    for module in model.modules():
        if isinstance(module, GRN):
            module.mode = "per_image"
    return model.eval()


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The encoder's blocks from first to last, by names such as `stage 1 block 2` or, without stages, `block 2`."""
    found = {name: (_BLOCK.fullmatch(name), module) for name, module in network.named_modules()}
    found = {name: pair for name, pair in found.items() if pair[0]}
    inner = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    return {_label(found[name][0]): found[name][1] for name in inner}


def encode(network: nn.Module, images: Tensor) -> Tensor:
    """The encoder's output for whole images (B, C, H, W): a map, or tokens (B, N, D)."""
    if isinstance(network, MaskedAutoencoder):
        return network.encode(images)
    return network.forward_features(images)


def rows(network: nn.Module, x: Tensor) -> Tensor:
    """What a block or the encoder of `network` puts out as (B, P, C): C channels at P positions, row-major.

    x: a map, or tokens, of which those that stand for no patch (class token, registers) are left out.
    """
    if x.ndim == 3:
        return x[:, prefix_tokens(network) :]
    return x.flatten(1, 2) if channels_last(network) else x.flatten(2).transpose(1, 2)


def patch_grid(network: nn.Module, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of a ViT's patches of images of (H, W) pixels; None for other networks."""
    if isinstance(network, MAE):
        return grid_size(size, network.patch_size)
    if not hasattr(network, "pos_embed") or not hasattr(network, "blocks"):
        return None
    # Of a hybrid a patch is one position of a map.
    return getattr(getattr(network, "patch_embed", None), "grid_size", None)


def sides(x: Tensor, last: bool, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of a map's positions. last: its channels are; grid: of the patches, if it is tokens instead."""
    return grid if x.ndim == 3 else tuple(x.shape[1:3] if last else x.shape[2:])


def exact(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def prefix_tokens(network: nn.Module) -> int:
    """How many tokens come before the patches'."""
    return 1 if isinstance(network, MaskedAutoencoder) else getattr(network, "num_prefix_tokens", 0)


def channels_last(network: nn.Module) -> bool:
    """Whether maps between its blocks are (B, H, W, C)."""
    return isinstance(network, MaskedAutoencoder) or "NHWC" in str(getattr(network, "output_fmt", ""))


def mlps_of(network: nn.Module, layer: str) -> dict[str, nn.Module]:
    """`fc1`, which widens a block's features, or `fc2`, which narrows them, of each block that has such. Not of gated
    MLPs, where half of what comes out of `fc1` is the gate."""
    found = {name: getattr(block, "mlp", None) for name, block in blocks_of(network).items()}
    plain = {name: mlp for name, mlp in found.items() if hasattr(mlp, "fc1") and hasattr(mlp, "fc2")}
    return {name: getattr(mlp, layer) for name, mlp in plain.items() if len(mlp.fc1.weight) == mlp.fc2.weight.shape[1]}


def unknown_blocks(network: nn.Module) -> str | None:
    """Why nothing can be seen between its layers, if so."""
    return (
        None if blocks_of(network) else "it has no blocks under known names (ConvNeXt, ViT, Swin, ResNet, EfficientNet)"
    )


@torch.no_grad()
def first_nonfinite(network: nn.Module, images: Tensor) -> str | None:
    """Where NaN or infinite features of whole images (B, C, H, W) begin: a block's name; None if all are finite."""
    bad: list[str] = []
    with watched(blocks_of(network), lambda name, x: None if x.isfinite().all() else bad.append(name)):
        output = encode(network, images)
    return bad[0] if bad else None if output.isfinite().all() else "its output"


def widened(network: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """What goes into or comes out of such a layer, (B, P, 4C), without tokens that stand for no patch."""
    if isinstance(layer, nn.Conv2d):
        return x.flatten(2).transpose(1, 2)
    return x.flatten(1, 2) if x.ndim == 4 else x[:, prefix_tokens(network) :]


def activation_of(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a block's MLP does after `fc1`; this toolkit's is no module."""
    return getattr(block.mlp, "act", F.gelu)


@contextmanager
def watched(modules: dict[str, nn.Module], see: Callable[[str, Tensor], None], inputs: bool = False) -> Iterator[None]:
    """`see(name, output)` whenever one of the modules has run, until the block ends; inputs: what went in instead.

    No gradient goes through it.
    """

    def hook_of(name: str):
        def hook(module: nn.Module, given: tuple, output: Tensor) -> None:
            with torch.no_grad():
                see(name, (given[0] if inputs else output).detach())

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _label(match: re.Match) -> str:
    numbers = [int(number) + 1 for number in match.groups() if number is not None]
    if match[5] is not None:
        numbers[0] -= 1  # ResNet counts from layer1
    return f"block {numbers[0]}" if len(numbers) == 1 else f"stage {numbers[0]} block {numbers[1]}"
