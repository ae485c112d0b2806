"""Whether features collapse while a model is pretrained: a fixed batch of images is encoded now and then.

What ConvNeXt V2's authors found after the fact (arXiv 2301.00808 §4) is so seen while it happens. Training is not
touched: no random number is drawn, no gradient taken, and the model is left in the mode it was in.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from fcmae.analysis.activations import watching_channels
from fcmae.analysis.blocks import encode
from fcmae.analysis.cosine_distance import watching_distances
from fcmae.data import MaskedImages
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.models.support import MINKOWSKI
from fcmae.schema import Config
from fcmae.train import optim
from fcmae.train.log import Log, MetricsFile
from fcmae.train.run_folder import RunFolder
from fcmae.train.state import TrainState

PROBE = 16  # images: the first of the data, as they were cut in epoch 0
# Features that have collapsed: the channels of a block are so much alike (0.5 is of unrelated ones, 0 of equal ones),
# or so large a share of its MLP's channels is zero everywhere.
ALIKE = 0.1
DEAD_SHARE = 0.5
WARNING = "features collapse: {what}; {advice}lower the learning rate (fcmae.analyze shows more)"


class CollapseWatch:
    """Measures after 0, `every`, 2 * `every`, ... steps, and writes collapse.jsonl and TensorBoard points.

    Called with the number of the step about to begin, on rank 0, or on all ranks where each has a part of the model.
    """

    def __init__(
        self,
        config: Config,
        state: TrainState,
        dataset: MaskedImages,
        folder: RunFolder,
        log: Log,
        device: torch.device,
    ):
        self.every = 0 if config.sparse.backend == MINKOWSKI else config.log.collapse_every  # its blocks take no maps
        self.state, self.dataset, self.log, self.device = state, dataset, log, device
        self.precision, self.batch = config.train.precision, min(PROBE, config.train.batch_size)
        v1 = hasattr(state.model, "norm") and state.model.norm == "none"
        self.advice = "GRN is there against it (model.norm=grn), or " if v1 else ""
        self.images: Tensor | None = None
        self.warned = False
        # A run that goes on from a step measures before it, whether or not the one before it had come to that.
        self.file = None
        if log.is_main and (self.every or folder.collapse.exists()):
            self.file = MetricsFile(folder.collapse, state.progress.step - 1)

    def __call__(self, step: int) -> None:
        """Measure, if it is time to."""
        if not self.every or step % self.every:
            return
        if self.images is None:
            items = [self.dataset[(0, i)]["image"] for i in range(min(PROBE, len(self.dataset)))]
            self.images = torch.stack(items)
        with optim.autocast(self.device, self.precision):
            row = measure(self.state.model, self.images.to(self.device), self.batch)
        if self.file is None:
            return
        self.file.write({"step": step, **_finite(row)})
        self.file.sync()
        self.log.scalars({f"collapse/{key}": x for key, x in row.items() if isinstance(x, float)}, step)
        what = collapsed(row)
        if what and not self.warned:
            self.warned = True
            self.log.say(f"warning: step {step}: {WARNING.format(what=what, advice=self.advice)}")

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def measure(model: MaskedAutoencoder, images: Tensor, batch: int) -> dict:
    """Means over the encoder's blocks and each block, on whole images (B, C, H, W): cosine distance of channels after
    the block and in its MLP, share of the MLP's channels that are dead. The model's mode stays what it is."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), watching_distances(model) as distances, watching_channels(model, outputs=False) as states:
            for part in images.split(batch):
                encode(model, part)
    finally:
        model.train(training)
    layers, states = distances(), states()
    dead = [state["widened"]["dead"] / state["widened"]["channels"] for state in states]
    return {
        "cosine_distance": statistics.fmean(layer["distance"] for layer in layers),
        "cosine_distance_in_mlp": statistics.fmean(layer["widened"] for layer in layers),
        "dead_share": statistics.fmean(dead),
        "layers": [
            {
                "layer": layer["layer"],
                "cosine_distance": layer["distance"],
                "in_mlp": layer["widened"],
                "dead_share": share,
            }
            for layer, share in zip(layers, dead, strict=True)
        ],
    }


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has no word for, of features that overflowed."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def collapsed(row: dict) -> str | None:
    """What of a measurement is beyond `ALIKE` or `DEAD_SHARE`, in words; None if nothing is."""
    distances = [(layer[key], layer["layer"]) for layer in row["layers"] for key in ("cosine_distance", "in_mlp")]
    least, where = min(((x, name) for x, name in distances if math.isfinite(x)), default=(1.0, ""))
    if least < ALIKE:
        return f"the cosine distance of channels is {least:.3f} in {where}, less than {ALIKE}"
    dead = max(row["layers"], key=lambda layer: layer["dead_share"])
    if dead["dead_share"] > DEAD_SHARE:
        return f"{dead['dead_share']:.0%} of the MLP's channels are dead in {dead['layer']}, more than {DEAD_SHARE:.0%}"
    return None
