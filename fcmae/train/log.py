"""What a run tells: metrics.jsonl, TensorBoard, and a progress bar (plain lines when not at a terminal)."""

from __future__ import annotations

import datetime
import json
import os
import resource
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from fcmae.errors import one_line
from fcmae.files import writing
from fcmae.schema import LogConfig
from fcmae.train.rows import go_on
from fcmae.train.run_folder import RunFolder
from fcmae.train.schedule import Schedule
from fcmae.train.state import Progress


class MetricsFile:
    """metrics.jsonl, only numbers that a repeated run repeats bit for bit, or times.jsonl: one object per logged step.

    Opened to go on after `step`; see `rows.go_on`.
    """

    def __init__(self, path: Path, step: int):
        if path.exists():
            go_on(path, step)
        self.path = path
        with writing(path):
            self._file = open(path, "ab", buffering=0)  # nothing is left to write when a full disk ends the run

    def write(self, row: dict) -> None:
        """Append one line. Raises UsageError when it cannot be written."""
        line = (json.dumps(row) + "\n").encode()
        with writing(self.path):
            while line:  # a disk takes what it has space for
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Force every line to disk. Raises UsageError when that fails."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Log:
    """A run's reporting: rank 0 writes and prints, other ranks only name their unreadable images.

    progress: where the run starts; schedule: where it ends. label: what to call the run, if there are several.
    """

    def __init__(
        self, folder: RunFolder, config: LogConfig, progress: Progress, schedule: Schedule, is_main: bool, label: str
    ):
        self.config, self.schedule, self.is_main, self.label = config, schedule, is_main, label
        self.metrics = self.times = self.tensorboard = self.bar = None
        step = progress.step
        self._bad_path, self._skipped_path = folder.path / "bad_images.txt", folder.skipped
        self._events = folder.path / "tensorboard"
        named = self._bad_path.read_text(errors="replace") if self._bad_path.exists() else ""
        self._bad_known = set(named.splitlines())
        self._start = self._logged = self._printed = progress.seconds, step
        self._waited, self._clock = 0.0, time.monotonic()
        if not is_main:
            return
        self.metrics, self.times = MetricsFile(folder.metrics, step), MetricsFile(folder.times, step)
        if folder.skipped.exists():
            MetricsFile(folder.skipped, step).close()
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._hook, threading.excepthook = threading.excepthook, _report
            with writing(self._events):
                self.tensorboard = SummaryWriter(str(self._events), purge_step=step + 1)
        if sys.stderr.isatty():
            self.bar = tqdm(
                desc=label or None, initial=step, total=schedule.steps, unit="step", dynamic_ncols=True, smoothing=0.05
            )

    def step(self, row: dict, seconds: float, total: float, waited: float) -> None:
        """Report one optimizer step. seconds: what it took; total: with all before; waited: of it, for data."""
        if not self.is_main:
            return
        step, last = row["step"], self.schedule.is_over(row["step"], total)
        self._waited += waited
        if step % self.config.every == 0 or last:
            self.metrics.write(row)
            self.times.write({"step": step, "seconds": total, "step_seconds": seconds, "waited": waited})
            self._scalars(row, total)
        self._progress(row, total, last)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Points for TensorBoard."""
        if self.tensorboard:
            with writing(self._events):
                for name, value in values.items():
                    self.tensorboard.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a written PNG in TensorBoard."""
        if self.tensorboard:
            with Image.open(path) as image, writing(self._events):
                self.tensorboard.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def sync(self) -> None:
        """Force every line to disk, so that a checkpoint is never ahead of them."""
        self.metrics.sync()
        self.times.sync()

    def say(self, line: str) -> None:
        """One line for people, beside the bar if there is one."""
        line = one_line(f"{self.label}: {line}" if self.label else line)
        if self.bar:
            self.bar.write(line)
        elif self.is_main:
            print(line, flush=True)

    def bad_images(self, names: list[str]) -> None:
        """Write the names of unreadable images of all ranks, which were replaced, to bad_images.txt, each once."""
        for name in names if self.is_main else ():
            if name not in self._bad_known:
                self._bad_known.add(name)
                _append(self._bad_path, name)
                self.say(f"warning: unreadable image replaced: {name}")

    def skipped(self, row: dict) -> None:
        """A line of skipped.jsonl, a file of runs that skipped a step."""
        if self.is_main:
            _append(self._skipped_path, json.dumps(row))

    def close(self) -> None:
        """Flush everything to disk."""
        if self.metrics:
            self.sync()
            self.metrics.close()
            self.times.close()
        if self.tensorboard:
            with writing(self._events):
                self.tensorboard.close()
            threading.excepthook = self._hook
        if self.bar:
            self.bar.close()
            self.bar = None

    def _scalars(self, row: dict, total: float) -> None:
        (then, then_step), step = self._logged, row["step"]
        self._logged = total, step
        if self.tensorboard:
            values = {k: row[k] for k in ("loss", "lr", "grad_norm", "loss_scale") if row.get(k) is not None}
            values["images_per_second"] = (step - then_step) * self.schedule.effective_batch / (total - then)
            values["data_wait_share"] = self._waited / (total - then)
            values["peak_memory_gib"] = peak_memory() / 2**30
            self.scalars({f"train/{name}": value for name, value in values.items()}, step)
        self._waited = 0.0

    def _progress(self, row: dict, total: float, last: bool) -> None:
        step, loss = row["step"], "nan" if row["loss"] is None else f"{row['loss']:.4f}"
        (then, then_step), batch = self._start if self.bar else self._printed, self.schedule.effective_batch
        rate = f"{batch * (step - then_step) / (total - then):.0f} img/s"
        steps, seconds = self.schedule.steps, self.schedule.seconds
        # By the clock: other runs may have their turns in between.
        share = (step - then_step) / (steps - step or 1) if steps else (total - then) / max(seconds - total, 1e-9)
        left = 0 if last else (time.monotonic() - self._clock) / share
        eta = f"eta {datetime.timedelta(seconds=round(left))}"
        if self.bar:
            self.bar.update(step - self.bar.n)
            own = "" if steps else f" {eta}"  # tqdm knows how many steps are left, not how many seconds
            self.bar.set_postfix_str(f"epoch {row['epoch']:.1f} loss {loss} lr {row['lr']:.2e} {rate}{own}")
        elif step % self.config.print_every == 0 or last:
            self._printed, self._clock = (total, step), time.monotonic()
            self.say(
                f"step {step}{'' if steps is None else f'/{steps}'} epoch {row['epoch']:.2f} loss {loss} "
                f"lr {row['lr']:.2e} {rate} {eta}"
            )


def _append(path: Path, line: str) -> None:
    with writing(path), open(path, "a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())  # before a checkpoint that counts it


def _report(args: threading.ExceptHookArgs) -> None:
    """As threads do, but for TensorBoard's, whose error the next point raises again."""
    if type(args.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        threading.__excepthook__(args)


def peak_memory() -> int:
    """Bytes: the most CUDA memory torch held, or this process's largest resident size without CUDA."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
