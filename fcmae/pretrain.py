"""Pretrain a masked autoencoder: `python -m fcmae.pretrain CONFIG.yaml [key=value ...]`.

The main path, top to bottom: configuration -> data -> model -> run folder -> training loop -> encoder.safetensors.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Generator
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from fcmae import config as settings
from fcmae import pictures
from fcmae.analysis.collapse import CollapseWatch
from fcmae.cli import run_command
from fcmae.data import MaskedImages, SampleStream, make_loader, open_source
from fcmae.data.dataset import KeyedImages
from fcmae.data.transforms import make_transform, stats
from fcmae.errors import UsageError
from fcmae.masking import draw_mask, grid_size
from fcmae.models import create_model
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.schema import Config
from fcmae.train import checkpoint, checks, distributed, family, loop, optim, sharding
from fcmae.train.head import describe_run, next_commands
from fcmae.train.init import start_from
from fcmae.train.log import Log
from fcmae.train.place import find_place
from fcmae.train.run_config import RunConfig
from fcmae.train.run_folder import RunFolder
from fcmae.train.schedule import Schedule, make_schedule
from fcmae.train.spikes import Spike, SpikeGuard
from fcmae.train.state import Progress, TrainState
from fcmae.train.target import fit_target


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input, 75 try again, 128 + n saved at signal n."""
    return run_command("fcmae.pretrain", Config, pretrain, argv)


def pretrain(config: Config) -> int:
    """Pretrain as configured; see `main` for the result. Raises UsageError for bad input."""
    checks.check(config)
    family.fill(config)
    with distributed.joined(config) as world:
        stop = loop.StopSignal()
        return loop.to_end(steps_of(config, world, stop), stop)


def steps_of(
    config: Config,
    world: distributed.World,
    stop: loop.StopSignal,
    dataset: MaskedImages | None = None,
    label: str = "",
) -> Generator[Progress, None, int]:
    """A run, one optimizer step for each value asked for, which is its progress; it returns the exit status of `main`.

    The first value comes when everything is ready and nothing trained. config: checked and filled. dataset: the images,
    if several runs share them; label: what to call the run in what is printed. Both are for runs that take turns.
    Raises UsageError for bad input.
    """
    checks.check_backend(config, world.device)
    torch.manual_seed(config.seed)
    if world.device.type == "cuda":
        # A resumed run must repeat the uninterrupted one bit for bit.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    model = build_model(config)
    if dataset is None:
        dataset = world.main_first(lambda: build_dataset(config, model))
    schedule = make_schedule(config.train, len(dataset), world.size)
    config.train.accum_steps, config.train.effective_batch = schedule.accum_steps, schedule.effective_batch

    # A run that stopped in this folder goes on; nothing is written before everything has been checked.
    folder = RunFolder(Path(config.out))
    held: list = []  # the folder's lock, until this function ends
    world.on_main(lambda: held.append(folder.hold()))
    world.on_main(lambda: folder.check(config))
    found, warnings = world.on_main(lambda: folder.find_checkpoint(config.resume))
    beginning = ""
    if found is None and config.init is not None:
        beginning = world.main_first(lambda: start_from(model, config.init))
    model.to(world.device)
    sharded = config.train.sharding == "full" and world.size > 1
    if sharded:
        sharding.shard(model, world.device, ("encode",))
    state = TrainState(
        model,
        optim.make_optimizer(model, config.train, world.device),
        optim.make_scaler(world.device, config.train.precision),
    )
    if found is not None:
        state.restore(checkpoint.read(found), str(found), config, len(dataset))
    start = state.progress.step
    if start:
        beginning = f"going on from step {start} of {schedule.goal}"
    if schedule.steps is not None and start > schedule.steps:
        raise UsageError(
            f"{found} is at step {start}, beyond this run's {schedule.steps}; raise train.epochs or train.steps"
        )
    if world.on_main(lambda: schedule.is_over(start, state.progress.seconds) and folder.encoder.is_file()):
        if world.is_main:
            print(f"{folder.path} is complete at step {start}{'' if label else '; out=... starts another run'}")
        return 0
    workers = worker_count(config.data.workers)
    fitted = fit_target(model, dataset, workers, world)  # not what a checkpoint or init brought
    forward = compiled(model, world.device) if config.train.compile else model
    world.on_main(lambda: held.append(folder.claim(config, held[0], new=held[0] is None)))
    if world.is_main:
        print(*[f"arm {label}:"] * bool(label), describe_run(config, model, schedule, world), sep="\n", flush=True)
    lines = [*(f"warning: {line}" for line in warnings), *filter(None, (beginning, fitted))]
    if world.size > 1 and not sharded:
        forward = distributed.replicated(forward)

    def write_checkpoint(payload: dict) -> None:
        log.sync()
        checkpoint.save(folder.checkpoints, payload, config.checkpoint)

    def save() -> None:
        payload = state.payload(config, len(dataset))
        world.on_main(lambda: write_checkpoint(payload))

    def picture() -> None:
        if config.log.images and (world.is_main or sharded):
            draw_reconstructions(config, state, dataset, folder, log, world.device)

    def loss(batch: dict) -> torch.Tensor:
        images = loop.to_device(batch["image"], world.device)
        tiles = loop.tiles_of(batch["mask"]).to(world.device, non_blocking=world.device.type == "cuda")
        return forward(images, tiles)[0]

    def begin(step: int) -> None:
        if world.is_main or sharded:
            watch(step)

    def restore() -> list[str]:
        # One that a signal asked for comes last, so that a run that was stopped goes back as far as another.
        newest, damaged = world.on_main(lambda: checkpoint.find_newest(folder.checkpoints, config.checkpoint.every))
        state.scaler = optim.make_scaler(world.device, config.train.precision)  # the old one is in the middle of a step
        state.restore(checkpoint.read(newest), str(newest), config, len(dataset))
        here = state.progress.step
        world.on_main(lambda: checkpoint.drop(folder.checkpoints, lambda step: step > here))
        return damaged

    guard = SpikeGuard(config.train.spike_factor, state)
    hooks = loop.Hooks(loss, save, picture, config.log.images_every, dataset.source.name, begin, guard)
    to_save = guard.factor is not None and (found is None or found.parent != folder.checkpoints)
    yield state.progress
    while True:  # once, but for spikes of the loss
        log = Log(folder, config.log, state.progress, schedule, world.is_main, label)
        for line in lines:
            log.say(line)
        watch = CollapseWatch(config, state, dataset, folder, log, world.device)
        try:
            if to_save:
                save()  # something to go back to
                to_save = False
            ended_by = yield from loop.train(
                state, forward, rest_of(dataset, config, schedule, world, state.progress), schedule, config, world, log,
                hooks, stop, in_turn=bool(label),
            )  # fmt: skip
            if not ended_by:
                begin(state.progress.step)  # what the last step left
            break
        except Spike as spike:
            lines = guard.go_back(spike, restore)
        finally:
            watch.close()
            log.close()
    if ended_by:
        log.say(f"signal {ended_by}: saved at step {state.progress.step}; the same command goes on from there")
        return 128 + ended_by
    weights = sharding.whole(model.state_dict())
    if world.is_main:
        pictures.loss_curve(folder.metrics, folder.path / "loss.png", f"{config.model.name}: {config.data.source}")
        folder.export_encoder(weights)  # last: its presence tells that the run is complete
        if not label:
            print(next_commands(config, model, folder))
    return 0


def build_model(config: Config) -> MaskedAutoencoder:
    """The model a configuration names. Raises UsageError for an unknown name or values that do not fit."""
    return create_model(
        config.model.name, image_size=settings.sides(config.model.image_size), **family.arguments(config)
    )


def build_dataset(config: Config, model: MaskedAutoencoder) -> MaskedImages:
    """The images with their crops, and masks for this model. Raises UsageError when there are none to be found."""
    d, grid = config.data, grid_size(model.image_size, model.mask_unit)
    transform = make_transform(
        image_size=model.image_size,
        in_chans=config.model.in_chans,
        crop_scale=tuple(d.crop_scale),
        flip=d.flip,
        mean=d.mean,
        std=d.std,
        crop=d.crop,
        color_jitter=d.color_jitter,
    )
    dataset = MaskedImages(
        open_source(d.source, config.model.in_chans),
        transform,
        config.seed,
        draw=partial(draw_mask, grid=grid, mask_ratio=model.mask_ratio, strategy=config.mask.strategy),
    )
    dataset[(0, 0)]  # a source of which nothing can be read is refused now, not in the middle of a run
    return dataset


def rest_of(
    dataset: KeyedImages, config: RunConfig, schedule: Schedule, world: distributed.World, progress: Progress
) -> DataLoader:
    """This rank's batches from where a run is to its end."""
    stream = SampleStream(
        len(dataset),
        batch_size=schedule.batch_size,
        accum_steps=schedule.accum_steps,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        start_step=progress.step + progress.ahead,
        end_step=sys.maxsize if schedule.steps is None else schedule.steps + progress.ahead,
    )
    pin = config.data.pin_memory and world.device.type == "cuda"
    return make_loader(dataset, stream, worker_count(config.data.workers), config.data.prefetch, pin_memory=pin)


def worker_count(wanted: int) -> int:
    """Loader processes of this rank: as asked, or (-1) one for each of its cores, 8 at most."""
    if wanted >= 0:
        return wanted
    place = find_place()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores, place.cores or cores // place.local_size))


def compiled(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model through torch.compile. Raises UsageError on a CPU without the C++ compiler that it needs."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UsageError(
            f"train.compile on a CPU needs a C++ compiler; {compiler} is not there: install it or turn it off"
        )
    return torch.compile(model, dynamic=False)  # every step has the same shapes


def draw_reconstructions(config, state: TrainState, dataset, folder: RunFolder, log: Log, device) -> None:
    """The run's picture: the first images of the data as they were in epoch 0, so that every picture shows the same."""
    step = state.progress.step
    items = [dataset[(0, i)] for i in range(min(config.log.images, len(dataset)))]
    images = torch.stack([item["image"] for item in items]).to(device)
    tiles = loop.tiles_of(torch.stack([item["mask"] for item in items])).to(device)
    with optim.autocast(device, config.train.precision):
        masked, filled = pictures.reconstruct(state.model, images, tiles)
    if not log.is_main:
        return
    label = f"step {step}; visible regions pasted in"
    if config.loss.norm_pix:
        label += f"; {pictures.TRUE_STATISTICS}"
    path = folder.pictures / f"step_{step:09d}.png"
    columns = {"original": images, "masked": masked, "reconstruction": filled}
    mean, std = stats(config.model.in_chans, config.data.mean, config.data.std)
    pictures.reconstruction_sheet(path, columns, mean, std, label)
    log.picture("reconstructions", path, step)


if __name__ == "__main__":
    sys.exit(main())
