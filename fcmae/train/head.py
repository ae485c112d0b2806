"""What a run says at its head and at its end."""

from __future__ import annotations

import timm
import torch

import fcmae
from fcmae.cli import command_line, timm_call
from fcmae.masking import grid_size, keep_count
from fcmae.models import find_model
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.schema import Config
from fcmae.train import family
from fcmae.train.distributed import World
from fcmae.train.run_folder import RunFolder
from fcmae.train.schedule import Schedule
from fcmae.train.sharding import local_count


def describe_run(config: Config, model: MaskedAutoencoder, schedule: Schedule, world: World) -> str:
    """The head of a run: versions, device, backend, model, data, mask, batch and learning rate."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else str(world.device)
    encoder = sum(p.numel() for p in model.encoder_parameters()) / 1e6
    whole = sum(p.numel() for p in model.parameters()) / 1e6
    h, w = model.image_size
    gh, gw = grid_size(model.image_size, model.mask_unit)
    keep = keep_count(gh * gw, model.mask_ratio)
    compiled = ", compiled (the first step takes long)" if config.train.compile else ""
    images = f"{schedule.dataset_size:,} images"
    length = f"{schedule.steps} steps = {schedule.epochs:g} epochs"
    if schedule.steps is None:
        length = f"{schedule.goal} of training, over which the schedule of {schedule.epochs:g} epochs is stretched"
    sharded = config.train.sharding == "full" and world.size > 1
    rows = {
        "fcmae": f"{fcmae.__version__}, torch {torch.__version__}",
        "device": f"{device} x {world.size}, {config.train.precision}{compiled}",
        "backend": model.describe_encoder(world.device),
        "model": f"{config.model.name}, {whole:.1f} M parameters of which the encoder {encoder:.1f} M",
        "sharding": f"full: {local_count(model) / whole / 1e6:.0%} of the parameters on rank 0" * sharded,
        "data": f"{config.data.source}: {images} as {config.model.in_chans} x {h} x {w}",
        "mask": f"{config.mask.strategy} {model.mask_ratio:g}: {keep} of {gh} x {gw} = {gh * gw} regions of "
        f"{model.mask_unit} px stay visible",
        "batch": f"{schedule.effective_batch} = {schedule.batch_size} x {schedule.accum_steps} accumulated"
        f" x {world.size} processes",
        "schedule": f"{length}, warm-up {schedule.warmup_epochs:g} epochs, peak lr {schedule.peak_lr:.3g}",
        "folder": str(config.out),
    }
    return "\n".join(f"{key:>9}  {text}" for key, text in rows.items() if text)


def next_commands(config: Config, model: MaskedAutoencoder, folder: RunFolder) -> str:
    """What a user may type next."""
    pictures = f", {folder.pictures}/" if config.log.images else ""
    lines = [f"done: {folder.path}", f"look:      {folder.path}/loss.png{pictures}"]
    if config.log.tensorboard:
        lines.append(f"           {command_line('-m', 'tensorboard.main', '--logdir', folder.path / 'tensorboard')}")
    name, arguments = find_model(config.model.name).timm, model.timm_arguments()
    if arguments is None:
        lines.append(
            f"use it:    timm has no ConvNeXt with norm {config.model.norm} in its blocks; in this toolkit's model by "
            f"init={folder.encoder} or fcmae.convert.read_checkpoint"
        )
    elif timm.is_model(name) and family.is_named_size(config):
        call = timm_call(name, {"num_classes": 0, **arguments}, folder.encoder)
        lines.append(f"use it:    {command_line('-c', f'import timm; print({call}.num_features)')}")
    if config.data.source == "sample":
        recipe, out = f"configs/pretrain/{config.model.name}.yaml", f"out=runs/{config.model.name.split('_', 1)[1]}"
        lines.append(f"your data: {command_line('-m', 'fcmae.pretrain', recipe, 'data.source=DIR', out)}")
    elif arguments is not None:
        probe = command_line("-m", "fcmae.probe", "configs/probe/knn.yaml", "--mode", "knn", f"init={folder.path}")
        lines.append(f"measure:   {probe} data.train=DIR data.val=DIR")
    return "\n".join(lines)
