"""A run's folder: whose it is, how a run goes on in it, and what it leaves for its users.

config.yaml  metrics.jsonl  times.jsonl  collapse.jsonl  tensorboard/  checkpoints/  reconstructions/*.png  loss.png
encoder.safetensors  and, where there was something to name, bad_images.txt  skipped.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO

from torch import Tensor

from fcmae import config as settings
from fcmae.checksum import write_safetensors
from fcmae.errors import TryAgain, UsageError
from fcmae.files import sweep
from fcmae.layouts import timm
from fcmae.train import checkpoint, family
from fcmae.train.lock import locked
from fcmae.train.run_config import RunConfig

_ARTIFACTS = (
    *("metrics.jsonl", "times.jsonl", "collapse.jsonl", "skipped.jsonl", "tensorboard"),
    *("checkpoints", "reconstructions", "encoder.safetensors"),
)
_LABELLED = ("validation.jsonl", "last.safetensors", "results.json", "classes.txt", "features")


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run and what may happen to them. free: settings with which it may go on; parts: its folders."""

    path: Path
    free: tuple[str, ...] = settings.FREE_KEYS
    parts: tuple[str, ...] = ("checkpoints", "reconstructions")

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def times(self) -> Path:
        """One JSON object per logged step: what it took, which no repeated run repeats."""
        return self.path / "times.jsonl"

    @property
    def skipped(self) -> Path:
        """One JSON object per step that was skipped because its loss or gradient was not finite: where that began."""
        return self.path / "skipped.jsonl"

    @property
    def collapse(self) -> Path:
        """One JSON object per measurement of how alike channels are, and of how many are dead."""
        return self.path / "collapse.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def validation(self) -> Path:
        """One JSON object per validation."""
        return self.path / "validation.jsonl"

    @property
    def results(self) -> Path:
        """The outcome of a run on labelled images, written last."""
        return self.path / "results.json"

    @property
    def pictures(self) -> Path:
        """Folder of the reconstructions."""
        return self.path / "reconstructions"

    @property
    def encoder(self) -> Path:
        """The encoder in timm's layout, written at the end."""
        return self.path / "encoder.safetensors"

    def check(self, config: RunConfig) -> None:
        """Raises UsageError when the folder holds another run, or files that belong to none."""
        if self.config.is_file():
            held = family.held(config, settings.read_yaml(self.config), str(self.config))
            changed = settings.differences(held, settings.to_dict(config), family.free(config, self.free))
            if changed:
                raise UsageError(
                    f"{self.path} holds another run ({settings.shown(changed)}); resume it with its own settings, "
                    f"choose another folder with out=..., or remove it"
                )
        else:
            foreign = [name for name in (*_ARTIFACTS, *_LABELLED) if (self.path / name).exists()]
            if foreign:
                raise UsageError(f"{self.path} has {foreign[0]} but no config.yaml; choose another folder with out=...")

    def hold(self) -> IO | None:
        """The lock of a folder that has a run, to be had before any of it is read: whoever has it may still be saving.

        None for a folder without one, in which nothing is written before everything has been checked: `claim` locks it.
        Raises UsageError when another process holds it.
        """
        return locked(self.path / ".lock") if self.config.is_file() else None

    def claim(self, config: RunConfig, held: IO | None = None, new: bool = False) -> IO:
        """Make the folder this run's, and hold it for this process until the returned file is closed.

        held: its lock, if this process has it. new: no run was there. Raises UsageError when it cannot be written, or
        when another process holds it; TryAgain when one began there meanwhile.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = held or locked(self.path / ".lock")
            if new and self.config.is_file():
                raise TryAgain(f"a run began in {self.path} just now; the same command goes on with it")
            # Before anything else: what lies here without it would look like another's.
            if not self.config.is_file():
                settings.write_yaml(config, self.config)
            for part in self.parts:
                (self.path / part).mkdir(exist_ok=True)
                sweep(self.path / part)  # a run saves at any step when it is told to end, and may be killed doing it
            return lock
        except OSError as error:
            raise UsageError(f"cannot write into out={self.path}: {error.strerror}; choose another folder") from None

    def find_checkpoint(self, resume: str | None) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and lines to warn with: unreadable ones passed over, a `resume` not used.

        That is the folder's newest whole one; only a folder without any starts from the file `resume`.
        """
        path, unreadable = checkpoint.find_newest(self.checkpoints)
        warnings = [f"{line}; falling back to the checkpoint before" for line in unreadable]
        if path is None and resume is None and self.metrics.is_file() and self.metrics.stat().st_size:
            warnings.append(f"{self.checkpoints} has no checkpoint: the run begins anew, as does {self.metrics.name}")
        if resume is not None and path is None:
            if not Path(resume).is_file():
                raise UsageError(f"resume={resume}: no such checkpoint file")
            checkpoint.read(Path(resume))
            path = Path(resume)
        elif resume is not None:
            warnings.append(f"resume={resume} is not used: {self.path} has its own checkpoint {path.name}")
        return path, warnings

    def export_encoder(self, weights: dict[str, Tensor]) -> None:
        """Of a model's state dict write `encoder.safetensors`, which timm loads as its model of the same size."""
        write_safetensors(self.encoder, timm.from_model(weights))
