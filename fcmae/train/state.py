"""What a checkpoint holds, and how a run is restored from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from fcmae import config as settings
from fcmae.errors import UsageError
from fcmae.layouts import LAYOUTS, training
from fcmae.train import family
from fcmae.train.run_config import RunConfig
from fcmae.train.sharding import spread_like, spread_state, whole


@dataclass
class Progress:
    """What a run carries from step to step besides tensors."""

    step: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    bad_images: int = 0  # unreadable images replaced, over all ranks
    ahead: int = 0  # steps whose images were passed over, by going back and on behind a spike of the loss
    rollbacks: int = 0  # how often the run went back
    tries: int = 0  # how often of late to the same checkpoint, that of step `back_at`
    back_at: int = -1
    recent: list[float] = field(default_factory=list)  # losses of the last steps, where spikes are looked for
    seconds: float = 0.0  # spent in steps, the mean of all ranks; checkpoints and pictures are not counted


@dataclass
class TrainState:
    """Everything that training changes.

    ema: the model's moving average. notes: plain data of the run, such as its best score.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress = field(default_factory=Progress)
    ema: nn.Module | None = None
    notes: dict = field(default_factory=dict)

    def payload(self, config: RunConfig, dataset_size: int) -> dict:
        """A checkpoint's content: tensors and plain data only, so that reading it never runs code.

        Every rank must ask: what is spread over them is gathered, for rank 0 alone to keep.
        """
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {
            "config": settings.to_dict(config),
            "dataset_size": dataset_size,
            "model": whole(dict(self.model.state_dict())),
            "optimizer": whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
            **({} if self.ema is None else {"ema": dict(self.ema.state_dict())}),
            **({"notes": self.notes} if self.notes else {}),
            **asdict(self.progress),
        }

    def restore(
        self,
        payload: dict,
        where: str,
        config: RunConfig,
        dataset_size: int,
        free: tuple[str, ...] = settings.BRANCH_KEYS,
        source: str = "data.source",
    ) -> None:
        """Go on from a payload of any backend, weights and optimizer state translated into this model's layout.

        free: settings that may differ. source: the setting that names the images. Raises UsageError when it belongs to
        another model, other settings or other images.
        """
        parts = ["config", "dataset_size", "model", "optimizer", "scaler", "rng", *["ema"] * (self.ema is not None)]
        if missing := [part for part in parts if part not in payload]:
            raise UsageError(f"{where} lacks {', '.join(missing)}, so no run goes on from it; init= takes its weights")
        given = family.held(config, payload["config"], where)
        changed = settings.differences(given, settings.to_dict(config), family.free(config, free))
        if changed:
            what = "model" if changed[0].startswith("model.") else "run"
            raise UsageError(
                f"{where} is of another {what} ({'; '.join(changed[:3])}); resume it with its own settings"
            )
        if payload["dataset_size"] != dataset_size:
            raise UsageError(
                f"{where} was trained on {payload['dataset_size']} images and {source} now has {dataset_size}; "
                f"restore the data, or start a new run with another out=..."
            )
        minkowski = LAYOUTS["minkowski"]
        own = minkowski.recognises(self.model.state_dict())
        if own != minkowski.recognises(payload["model"]):
            payload = training.translate(payload, minkowski.from_fcmae if own else minkowski.to_fcmae)
        held = self.model.state_dict()
        for key, x in payload["model"].items():
            if key in held and held[key].shape != x.shape:
                raise UsageError(f"{where}: {key} is {tuple(x.shape)} there and {tuple(held[key].shape)} in this model")
        weights = {key: spread_like(x, held[key]) if key in held else x for key, x in payload["model"].items()}
        self.model.load_state_dict(weights, strict=True)
        optimizer = training.in_order_of(payload["optimizer"], self.optimizer.state_dict())
        self.optimizer.load_state_dict(spread_state(optimizer, self.optimizer))
        self.scaler.load_state_dict(payload["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(payload["ema"], strict=True)
        self.notes = dict(payload.get("notes", {}))
        self.progress = Progress(**{key: payload.get(key, value) for key, value in asdict(Progress()).items()})
        torch.set_rng_state(payload["rng"]["torch"])
        if torch.cuda.is_initialized():
            for device, rng in enumerate(payload["rng"]["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(rng, device)
