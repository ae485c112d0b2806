"""A run's folder: whose it is, how a run goes on in it, and what it leaves for its users.

config.yaml  metrics.jsonl  tensorboard/  checkpoints/  reconstructions/*.png  loss.png  encoder.safetensors
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import nn

from fcmae import config as settings
from fcmae.errors import UsageError
from fcmae.layouts import timm as timm_layout
from fcmae.train import checkpoint

_ARTIFACTS = ("metrics.jsonl", "tensorboard", "checkpoints", "reconstructions", "encoder.safetensors")


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run and what may happen to them."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        """Folder of the reconstructions."""
        return self.path / "reconstructions"

    @property
    def encoder(self) -> Path:
        """The encoder in timm's layout, written at the end."""
        return self.path / "encoder.safetensors"

    def check(self, config: settings.Config) -> None:
        """Raises UsageError when the folder holds another run, or files that belong to none."""
        if self.config.is_file():
            changed = settings.differences(
                settings.read_yaml(self.config), settings.to_dict(config), settings.FREE_KEYS
            )
            if changed:
                more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
                raise UsageError(
                    f"{self.path} holds another run ({'; '.join(changed[:3])}{more}); resume it with its own settings, "
                    f"or choose another folder with out=..."
                )
        else:
            foreign = [name for name in _ARTIFACTS if (self.path / name).exists()]
            if foreign:
                raise UsageError(f"{self.path} has {foreign[0]} but no config.yaml; choose another folder with out=...")

    def claim(self, config: settings.Config) -> None:
        """Make the folder this run's. Raises UsageError when it cannot be written."""
        try:
            for folder in (self.path, self.checkpoints, self.pictures):
                folder.mkdir(parents=True, exist_ok=True)
            if not self.config.is_file():
                settings.write_yaml(config, self.config)
        except OSError as error:
            raise UsageError(f"cannot write into out={self.path}: {error.strerror}; choose another folder") from None

    def find_checkpoint(self, resume: str | None) -> tuple[dict | None, list[str]]:
        """The checkpoint to go on from, and one line for each unreadable one that was passed over.

        That is the folder's newest whole one; only a folder without any starts from the file `resume`.
        """
        payload, complaints = checkpoint.read_newest(self.checkpoints)
        if payload is None and resume is not None:
            payload = checkpoint.read(Path(resume))
        return payload, complaints

    def export_encoder(self, model: nn.Module) -> None:
        """Write `encoder.safetensors`, which timm loads as its model of the same size."""
        # One entry only: safetensors writes several in random order, and equal runs should leave equal files.
        data = save(timm_layout.from_encoder(model.encoder.state_dict()), metadata={"format": "pt"})
        checkpoint.write_whole(self.encoder, lambda file: file.write(data))
