"""Reconstructions of the same images by one or more runs, under one mask strategy and ratio."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fcmae import pictures
from fcmae.analysis.images import Images
from fcmae.analysis.subjects import Subject
from fcmae.errors import UsageError
from fcmae.masking import STRATEGIES, draw_mask, grid_size
from fcmae.train.loop import tiles_of

CELL = 160  # pixels of a picture on the page, at least
GAP = 4
ORIGINALS = "original", "masked"  # columns beside the runs'


@dataclass(frozen=True)
class Sheet:
    """columns: named pixels (B, 3, H, W) in [0, 1], hidden ones NaN. losses: of each run on these images and masks.
    true_statistics: the runs whose predictions were brought back to pixels by statistics they have not seen."""

    strategy: str
    ratio: float
    columns: dict[str, Tensor]
    losses: dict[str, float]
    true_statistics: list[str]

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.strategy}_{self.ratio:g}"

    def label(self) -> str:
        """What is to be said wherever it is shown."""
        said = "visible regions pasted in"
        if not self.true_statistics:
            return said
        every = len(self.true_statistics) == len(self.losses)
        whose = "" if every else f"{', '.join(self.true_statistics)}: "
        return f"{said}; {whose}{pictures.TRUE_STATISTICS}"


def check_labels(subjects: list[Subject]) -> None:
    """Raises UsageError for a run that is called as a column beside the runs'."""
    if wrong := [subject.label for subject in subjects if subject.label in ORIGINALS]:
        raise UsageError(f"a run cannot be called {wrong[0]} here, as what is shown beside it is; choose with --labels")


def sheets_in(folder: Path) -> list[str]:
    """Names of the files in a folder that are called as sheets are."""
    name = re.compile(rf"({'|'.join(STRATEGIES)})_[\d.e-]+\.png")
    return sorted(path.name for path in folder.iterdir() if name.fullmatch(path.name))


def masks_of(grid: tuple[int, int], count: int, strategy: str, ratio: float, seed: int) -> Tensor:
    """A mask (count, gh, gw) bool for each image, by its number and the seed alone: at a higher ratio, random masks
    hide what they hid and more. Raises UsageError for a ratio that keeps none or all of the regions."""
    drawn = [draw_mask(np.random.default_rng([seed, i]), grid, ratio, strategy) for i in range(count)]
    return torch.from_numpy(np.stack(drawn))


@torch.no_grad()
def reconstructions(subjects: list[Subject], images: Images, strategy: str, ratio: float, seed: int) -> Sheet:
    """What every run makes of the images. Raises UsageError for a ratio that keeps none or all of the regions."""
    units, sizes = {(s.image_size, s.autoencoder.mask_unit) for s in subjects}, {s.image_size for s in subjects}
    first = subjects[0]
    columns = {ORIGINALS[0]: pixels(first, images.tensors[first.label])}
    losses: dict[str, float] = {}
    for subject in subjects:
        model, batch = subject.autoencoder, images.tensors[subject.label].to(subject.device)
        grid = grid_size(subject.image_size, model.mask_unit)
        tiles = tiles_of(masks_of(grid, len(batch), strategy, ratio, seed)).to(subject.device)
        masked, filled = pictures.reconstruct(model, batch, tiles)
        losses[subject.label] = model(batch, tiles)[0].item()
        size = "" if len(sizes) == 1 else f" of {subject.image_size[0]} x {subject.image_size[1]}"
        name = ORIGINALS[1] if len(units) == 1 else f"{ORIGINALS[1]}, {model.mask_unit} px{size}"
        columns.setdefault(name, pixels(subject, masked))
        columns[subject.label] = pixels(subject, filled)
    normed = [s.label for s in subjects if s.autoencoder.norm_pix]
    return Sheet(strategy, ratio, columns, losses, normed)


def pixels(subject: Subject, images: Tensor) -> Tensor:
    """Normalized images (B, C, H, W) as pixels (B, 3, H, W) in [0, 1] on the CPU, hidden ones NaN still; one channel is
    shown grey, more than three by the first three."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (subject.mean, subject.std))
    shown = (images.cpu().float() * std + mean).clamp(0, 1)
    return shown[:, :3] if shown.shape[1] >= 3 else shown[:, :1].expand(-1, 3, -1, -1)


def write_sheet(path: Path, sheet: Sheet) -> None:
    """The sheet as a labelled PNG."""
    losses = ", ".join(f"{label} {loss:.4f}" for label, loss in sheet.losses.items())
    lines = f"{sheet.strategy} masks, ratio {sheet.ratio:g}; loss {losses}", sheet.label()
    width = 34 * len(sheet.columns)  # characters that fit above so many pictures
    title = "\n".join(part for line in lines for part in textwrap.wrap(line, width))
    pictures.reconstruction_sheet(path, sheet.columns, (0.0,) * 3, (1.0,) * 3, title)


def strip(sheet: Sheet) -> Image.Image:
    """The same without words: a row for each image, a column for each tensor, all cells of one size, white gaps."""
    batches = list(sheet.columns.values())
    height, width = (max(batch.shape[side] for batch in batches) for side in (2, 3))
    times = -(-CELL // max(height, width))
    height, width = height * times, width * times
    count = len(batches[0])
    size = (len(batches) * (width + GAP) - GAP, count * (height + GAP) - GAP)
    made = Image.new("RGB", size, "white")
    for column, batch in enumerate(batches):
        for row, image in enumerate(batch):
            array = (torch.nan_to_num(image, nan=0.5) * 255).round().byte().permute(1, 2, 0).numpy()
            cell = Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST)
            made.paste(cell, (column * (width + GAP), row * (height + GAP)))
    return made
