"""What every training run is told, whatever it trains."""

from __future__ import annotations

from typing import Protocol

from fcmae.schema import CheckpointConfig, LogConfig, TrainConfig


class BadImages(Protocol):
    """The data's setting that the loop knows."""

    max_bad_share: float


class RunConfig(Protocol):
    """The part of a command's configuration that the training loop, checkpoints and the run folder use."""

    out: str | None
    resume: str | None
    seed: int
    data: BadImages
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig
