"""The most memory that training an arm holds. On a CPU a process of its own measures it: this module as a command."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from fcmae import config as settings
from fcmae.errors import UsageError
from fcmae.masking import draw_mask, grid_size
from fcmae.pretrain import build_model, compiled
from fcmae.schema import Config
from fcmae.train import optim
from fcmae.train.loop import tiles_of

STEPS = 3


def peak_memory(config: Config, path: Path, device: torch.device) -> dict[str, object]:
    """Bytes that training holds at most, in a few steps on noise of this arm's batch size, and what was measured.

    config: the arm's, also in the file `path`. On CUDA what torch allocated; on a CPU the growth of a fresh process's
    resident memory; elsewhere, and where it fails, None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            _steps(config, device)
        except torch.OutOfMemoryError:
            return _unknown(config, "there is less memory than in training")
        held, what = torch.cuda.max_memory_allocated(device) - before, "torch.cuda.max_memory_allocated"
    elif device.type == "cpu":
        try:
            held, what = _measured_apart(path), "growth of a fresh process's resident memory from before the model on"
        except UsageError as error:
            return _unknown(config, str(error))
    else:
        return _unknown(config, f"{device.type} does not tell")
    text = f"{what}, over {STEPS} training steps on noise"
    return {"bytes": held, "batch_size": config.train.batch_size, "what": text}


def _unknown(config: Config, reason: str) -> dict[str, object]:
    return {"bytes": None, "batch_size": config.train.batch_size, "what": f"not measured, {reason}"}


def _measured_apart(path: Path) -> int:
    command = [sys.executable, "-m", "fcmae.comparison.memory", str(path)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(f"the process for it failed: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return int(done.stdout)


def _steps(config: Config, device: torch.device) -> None:
    model = build_model(config).to(device)
    forward = compiled(model, device) if config.train.compile else model
    optimizer = optim.make_optimizer(model, config.train, device)
    scaler = optim.make_scaler(device, config.train.precision)
    rng, grid = np.random.default_rng(0), grid_size(model.image_size, model.mask_unit)
    size = config.train.batch_size
    masks = [draw_mask(rng, grid, model.mask_ratio, config.mask.strategy) for _ in range(size)]
    tiles = tiles_of(torch.from_numpy(np.stack(masks))).to(device)
    images = torch.randn(size, model.in_chans, *model.image_size).to(device)
    for _ in range(STEPS):
        with optim.autocast(device, config.train.precision):
            loss = forward(images, tiles)[0]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)


def _resident(field: str) -> int:
    """Bytes of resident memory now (VmRSS) or at most (VmHWM); without Linux's /proc the most there has been."""
    status = Path("/proc/self/status")
    rows = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.is_file() else {}
    if field in rows:
        return int(rows[field].split()[0]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


if __name__ == "__main__":
    arm = settings.load(Config, sys.argv[1], [])
    start = _resident("VmRSS")
    _steps(arm, torch.device("cpu"))
    print(_resident("VmHWM") - start)
