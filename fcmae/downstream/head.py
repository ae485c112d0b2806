"""What a run on labelled images says at its head and at its end."""

from __future__ import annotations

import json

import torch
from torch import nn

import fcmae
from fcmae.cli import command_line, timm_call
from fcmae.downstream.groups import scheme_of
from fcmae.downstream.labelled import Labelled
from fcmae.downstream.settings import DownstreamConfig, image_size
from fcmae.downstream.start import Start
from fcmae.train.distributed import World
from fcmae.train.run_folder import RunFolder
from fcmae.train.schedule import Schedule


def describe_run(
    config: DownstreamConfig, start: Start, model: nn.Module, labelled: Labelled, schedule: Schedule, world: World,
    parts: list[dict],
) -> str:  # fmt: skip
    """The head of a run: versions, device, model, weights, data, batch, schedule and layers."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else str(world.device)
    whole = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    h, w = image_size(config)
    compiled = ", compiled (the first step takes long)" if config.train.compile else ""
    length = (
        f"{schedule.steps} steps = {schedule.epochs:g} epochs" if schedule.steps else f"{schedule.goal} of training"
    )
    scales = [group["lr_scale"] for group in parts]
    layers = "the same lr for all"
    if config.train.layer_decay not in (None, 1):
        per = f"{config.train.layer_decay:g} per {scheme_of(start.spec, config.train)}"
        layers = f"lr x {min(scales):.3g} of the first to {max(scales):g} of the last layer, {per}"
    rows = {
        "fcmae": f"{fcmae.__version__}, torch {torch.__version__}",
        "device": f"{device} x {world.size}, {config.train.precision}{compiled}",
        "model": f"{start.spec.name or start.spec}, {whole:.1f} M parameters of which {trained:.1f} M are trained",
        "weights": start.said,
        "data": f"{config.data.train}: {len(labelled.train):,} images of {len(labelled.classes)} classes as "
        f"{config.model.in_chans} x {h} x {w}",
        "validate": f"{config.data.val}: {len(labelled.val):,} images, every {config.eval.every:g} epochs",
        "batch": f"{schedule.effective_batch} = {schedule.batch_size} x {schedule.accum_steps} accumulated"
        f" x {world.size} processes",
        "schedule": f"{length}, warm-up {schedule.warmup_epochs:g} epochs, peak lr {schedule.peak_lr:.3g}",
        "layers": f"{layers}; parameters.txt lists them",
        "folder": str(config.out),
    }
    return "\n".join(f"{key:>9}  {text}" for key, text in rows.items())


def next_commands(config: DownstreamConfig, folder: RunFolder) -> str:
    """The result and what a user may type next."""
    found = json.loads(folder.results.read_text())
    ema = f", {100 * found['ema']['top1']:.2f} % of the average" if found["ema"] else ""
    best, out = found["best"], folder.path
    lines = [
        f"done: {out}: top-1 {100 * found['last']['top1']:.2f} % at the end{ema}; "
        f"best {100 * best['top1']:.2f} % at step {best['step']} ({best['of']})",
        f"look:      {out}/curve.png, confusion.png, per_class.json, results.json",
    ]
    if found["model"]:
        arguments = json.loads((out / "best.json").read_text())["timm"]
        call = timm_call(found["model"], arguments, out / "best.safetensors")
        lines.append(f"use it:    {command_line('-c', f'import timm; {call}')}")
    if found["blocks_trained"] is None:
        lines.append(f"compare:   {command_line('-m', 'fcmae.finetune', '--table', out)} OTHER_RUN")
    return "\n".join(lines)
