"""What a checkpoint holds, and how a run is restored from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from fcmae import config as settings
from fcmae.errors import UsageError
from fcmae.layouts import LAYOUTS, training
from fcmae.schema import Config
from fcmae.train import family


@dataclass
class Progress:
    """What a run carries from step to step besides tensors."""

    step: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    bad_images: int = 0  # unreadable images replaced, over all ranks
    seconds: float = 0.0  # spent in steps, the mean of all ranks; checkpoints and pictures are not counted


@dataclass
class TrainState:
    """Everything that training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)

    def payload(self, config: Config, dataset_size: int) -> dict:
        """A checkpoint's content: tensors and plain data only, so that reading it never runs code."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {
            "config": settings.to_dict(config),
            "dataset_size": dataset_size,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
            **asdict(self.progress),
        }

    def restore(self, payload: dict, where: str, config: Config, dataset_size: int) -> None:
        """Go on from a payload of any backend, weights and optimizer state translated into this model's layout.

        Raises UsageError when it belongs to another model, other settings or other images.
        """
        held = family.held(payload["config"], where)
        changed = settings.differences(held, settings.to_dict(config), family.free(config, settings.BRANCH_KEYS))
        if changed:
            what = "model" if changed[0].startswith("model.") else "run"
            raise UsageError(
                f"{where} is of another {what} ({'; '.join(changed[:3])}); resume it with its own settings"
            )
        if payload["dataset_size"] != dataset_size:
            raise UsageError(
                f"{where} was trained on {payload['dataset_size']} images and data.source now has {dataset_size}; "
                f"restore the data, or start a new run with another out=..."
            )
        minkowski = LAYOUTS["minkowski"]
        own = minkowski.recognises(self.model.state_dict())
        payload = training.translate(payload, minkowski.from_fcmae if own else minkowski.to_fcmae)
        self.model.load_state_dict(payload["model"], strict=True)
        self.optimizer.load_state_dict(training.in_order_of(payload["optimizer"], self.optimizer.state_dict()))
        self.scaler.load_state_dict(payload["scaler"])
        self.progress = Progress(**{key: payload.get(key, value) for key, value in asdict(Progress()).items()})
        torch.set_rng_state(payload["rng"]["torch"])
        if torch.cuda.is_initialized():
            for device, rng in enumerate(payload["rng"]["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(rng, device)
