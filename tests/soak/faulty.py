"""A pretraining run with numbers that go wrong on purpose: `python faulty.py FAULTS.json CONFIG [key=value ...]`.

FAULTS: a list of {"step", "rank", "kind"}, steps counted from 1, each of one forward pass. kind: `loss`, which becomes
NaN; `gradient` of the parameter "layer", one number of which becomes infinite; `scale`, fp16's, which becomes so large
that gradients overflow. At the end every rank writes a list to OUT/weights_RANK.json, digests of its weights before
each step and after the last.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from fcmae import pretrain
from fcmae.train import optim

RANK = int(os.environ.get("RANK", "0"))


class Faults:
    """Makes a model go wrong at the steps of this rank's faults."""

    def __init__(self, faults: list[dict]):
        self.at = {fault["step"]: fault for fault in faults if fault["rank"] == RANK}
        self.step = 0
        self.model: nn.Module | None = None
        self.scaler: torch.amp.GradScaler | None = None
        self.weights: list[str] = []  # a digest before each step

    def attach(self, model: nn.Module) -> nn.Module:
        """The model, followed step by step."""
        self.model = model
        assert {fault["layer"] for fault in self.at.values() if "layer" in fault} <= dict(
            model.named_parameters()
        ).keys()
        model.register_forward_hook(self._forward)
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: self._gradient(name, gradient))
        return model

    def _forward(self, model: nn.Module, given: tuple, output: tuple) -> tuple:
        if not model.training:
            return output
        self.step += 1
        self.weights.append(digest(model))
        fault = self.at.get(self.step, {})
        if fault.get("kind") == "scale":
            self.scaler.update(2.0**30)
        return (output[0] * float("nan"), *output[1:]) if fault.get("kind") == "loss" else output

    def _gradient(self, name: str, gradient: Tensor) -> Tensor:
        fault = self.at.get(self.step, {})
        if fault.get("kind") != "gradient" or fault["layer"] != name:
            return gradient
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        gradient.view(-1)[-1] = float("inf")
        return gradient


def main() -> int:
    faults = Faults(json.loads(Path(sys.argv[1]).read_text()))
    build, make_scaler = pretrain.build_model, optim.make_scaler

    def build_model(config) -> nn.Module:
        return faults.attach(build(config))

    def scaler_of(*given) -> torch.amp.GradScaler:
        faults.scaler = make_scaler(*given)
        return faults.scaler

    pretrain.build_model, optim.make_scaler = build_model, scaler_of
    status = pretrain.main(sys.argv[2:])
    out = next(text.removeprefix("out=") for text in sys.argv if text.startswith("out="))
    (Path(out) / f"weights_{RANK}.json").write_text(json.dumps([*faults.weights, digest(faults.model)]))
    return status


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters, of this rank's part of them where they are spread."""
    found = hashlib.sha256()
    for x in model.parameters():
        x = x.detach()
        # A copy: what NumPy has seen torch does not resize, as FSDP does.
        found.update(getattr(x, "_local_tensor", x).clone().cpu().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
