"""Training a part of a model: the rest takes no gradient, stays in evaluation mode, and is proven not to have moved."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from fcmae.errors import UsageError
from fcmae.layouts.convnext_spec import ConvNextSpec
from fcmae.layouts.sizes import Spec


def blocks_of(spec: Spec) -> list[str]:
    """The names of a timm model's blocks, from first to last."""
    if isinstance(spec, ConvNextSpec):
        return [f"stages.{s}.blocks.{b}" for s, depth in enumerate(spec.depths) for b in range(depth)]
    return [f"blocks.{b}" for b in range(spec.depth)]


def last_blocks(spec: Spec, count: float) -> list[str]:
    """The modules trained when `count` of the last blocks are: 0 the classifier alone, 0.5 the last block's MLP too.

    With a block come the norm after the last one and, with the first of a stage, the downsampling that opens it.
    Raises UsageError when there are not so many.
    """
    blocks, convnext = blocks_of(spec), isinstance(spec, ConvNextSpec)
    if count > len(blocks):
        raise UsageError(f"probe.blocks: {count:g} blocks of the {len(blocks)} that {spec.name or spec.title} has")
    head = ["head.fc"] if convnext else ["head"]
    if not count:
        return head
    norms = ["head.norm"] if convnext else ["norm", "fc_norm"]
    if count == 0.5:
        inner = ("norm", "mlp", "drop_path") if convnext else ("norm2", "mlp", "ls2", "drop_path2")
        return [*(f"{blocks[-1]}.{name}" for name in inner), *norms, *head]
    trained = blocks[-int(count) :]
    opened = [name.replace("blocks.0", "downsample") for name in trained if convnext and name.endswith("blocks.0")]
    return [*opened, *trained, *norms, *head]


class Frozen:
    """What of a model is not trained. trained: names of modules; None: everything is, and nothing frozen.

    To be made before a checkpoint is restored: what is frozen must then be what the model began with.
    """

    def __init__(self, model: nn.Module, trained: list[str] | None):
        self._model, self._trained = model, trained
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._is_trained(name))
        self._resting = [module for name, module in model.named_modules() if not self._is_trained(name)]
        self._before = self._digests()

    def __len__(self) -> int:
        """Tensors frozen."""
        return len(self._before)

    def train(self) -> None:
        """Training mode for what is trained alone: frozen drop path lets through, frozen statistics stand still."""
        self._model.train()
        for module in self._resting:
            module.training = False

    def moved(self) -> list[str]:
        """The frozen tensors that are not, bit for bit, what they were."""
        after = self._digests()
        return [name for name, digest in self._before.items() if after.get(name) != digest]

    def check(self) -> None:
        """Raises RuntimeError unless every frozen tensor is what it was, bit for bit."""
        if moved := self.moved():
            raise RuntimeError(f"{len(moved)} frozen tensors have changed, the first: {moved[0]}")

    def _is_trained(self, name: str) -> bool:
        return self._trained is None or any(name == t or name.startswith(f"{t}.") for t in self._trained)

    def _digests(self) -> dict[str, str]:
        frozen = {name: x for name, x in self._model.state_dict().items() if not self._is_trained(name)}
        return {name: _digest(x) for name, x in frozen.items()}


def _digest(x: torch.Tensor) -> str:
    data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest()
