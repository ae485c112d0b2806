"""Fine-tune a classifier from pretrained weights, or train one from scratch: `python -m fcmae.finetune CONFIG.yaml
[key=value ...]`; --eval validates only; `--table RUN RUN ...` compares finished runs.

The main path, top to bottom: configuration -> weights -> labelled images -> timm's model, what of it is trained, with
which learning rates -> run folder -> training loop with validations -> classifiers that timm loads, results.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO

import torch
from torch import nn

from fcmae.cli import run_command
from fcmae.data import LabelledImages
from fcmae.downstream import checks, export, groups, table
from fcmae.downstream.augment import objective, seed_step, training_transform
from fcmae.downstream.batch_norm import average_statistics, normalize_features
from fcmae.downstream.data import as_source, open_parts
from fcmae.downstream.eval_only import evaluate
from fcmae.downstream.evaluation import validate
from fcmae.downstream.frozen import Frozen, last_blocks
from fcmae.downstream.head import describe_run, next_commands
from fcmae.downstream.labelled import Labelled
from fcmae.downstream.settings import DownstreamConfig, FinetuneConfig, branch_keys, free_keys
from fcmae.downstream.start import Start, build, find_start
from fcmae.errors import UsageError
from fcmae.files import write_whole
from fcmae.pretrain import compiled, rest_of, worker_count
from fcmae.train import checkpoint, distributed, loop, optim
from fcmae.train.log import Log, MetricsFile
from fcmae.train.run_folder import RunFolder
from fcmae.train.schedule import make_schedule
from fcmae.train.state import Progress, TrainState

FORMAT = "fcmae-finetune-1"


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input, 75 try again, 128 + n saved at signal n."""
    given = sys.argv[1:] if argv is None else argv
    if "--table" in given:
        return table.command([a for a in given if a != "--table"])
    rest = [a for a in given if a != "--eval"]
    if rest != given:  # a recipe's `out` is of its run
        rest += ["eval_only=true", *["out=null"] * (not any(a.startswith("out=") for a in given))]
    return run_command("fcmae.finetune", FinetuneConfig, finetune, rest)


def finetune(config: FinetuneConfig) -> int:
    """Fine-tune as configured; see `main` for the result. Raises UsageError for bad input."""
    if config.eval_only:
        return evaluate(config)
    checks.check(config)
    with distributed.joined(config) as world:
        return train_to_end(config, world, loop.StopSignal())


def train_to_end(
    config: DownstreamConfig,
    world: distributed.World,
    stop: loop.StopSignal,
    blocks: float | None = None,
    before_writing: Callable[[], None] = lambda: None,
) -> int:
    """A run of `steps_of` from here to its end: the exit status."""
    return loop.to_end(steps_of(config, world, stop, blocks, before_writing), stop)


def steps_of(
    config: DownstreamConfig,
    world: distributed.World,
    stop: loop.StopSignal,
    blocks: float | None = None,
    before_writing: Callable[[], None] = lambda: None,
) -> Generator[Progress, None, int]:
    """A run, one optimizer step for each value asked for, which is its progress; it returns the exit status of `main`.

    config: checked. blocks: how many of the last blocks are trained, 0 the classifier alone, None everything.
    before_writing: called on rank 0 when everything has been checked. Raises UsageError for bad input.
    """
    torch.manual_seed(config.seed)
    if world.device.type == "cuda":
        # A resumed run must repeat the uninterrupted one bit for bit.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    start, labelled = find_start(config), find_images(config, world)
    classes, workers = labelled.classes, worker_count(config.data.workers)
    model = build(start, len(classes), config).to(world.device)
    if blocks is not None and config.probe.batch_norm:
        normalize_features(model)
    frozen = Frozen(model, None if blocks is None else last_blocks(start.spec, blocks))
    dataset = LabelledImages(
        *as_source(labelled.train, config.model.in_chans), training_transform(config), config.seed
    )  # fmt: skip
    dataset[(0, 0)]  # a source of which nothing can be read is refused now, not in the middle of a run
    schedule = make_schedule(config.train, len(dataset), world.size)
    config.train.accum_steps, config.train.effective_batch = schedule.accum_steps, schedule.effective_batch
    parts = groups.make_groups(model, start.spec, config.train)
    ema = averaged(model, config.ema.decay) if config.ema.enabled else None
    state = TrainState(
        model,
        groups.make_optimizer(parts, config.train, world.device),
        optim.make_scaler(world.device, config.train.precision),
        ema=ema and ema.module,
    )

    # A run that stopped in this folder goes on; nothing is written before everything has been checked.
    folder = RunFolder(Path(config.out), free_keys(config), ("checkpoints",))
    held: list = []  # the folder's lock, until this function ends
    world.on_main(lambda: held.append(folder.hold()))
    world.on_main(lambda: check_folder(folder, config, classes))
    found, warnings = world.on_main(lambda: folder.find_checkpoint(config.resume))
    if found is not None:
        state.restore(checkpoint.read(found), str(found), config, len(dataset), branch_keys(config), "data.train")
        if moved := frozen.moved():
            raise UsageError(
                f"{found} has other frozen weights than init={config.init} gives ({moved[0]}); name the init that it "
                f"began with, or start anew with another out=..."
            )
        lost = world.on_main(lambda: export.damage(folder.path / "best.safetensors"))
        if lost is not None:  # or branched off: the best of this run is yet to come
            state.notes.pop("best", None)
            warnings += [f"{lost}; the best weights from here on are kept"] * (found.parent == folder.checkpoints)
    first = state.progress.step
    if schedule.steps is not None and first > schedule.steps:
        raise UsageError(
            f"{found} is at step {first}, beyond this run's {schedule.steps}; raise train.epochs or train.steps"
        )
    over = schedule.is_over(first, state.progress.seconds)
    if over and found.parent != folder.checkpoints:
        raise UsageError(f"{found} is at the end of this run, step {first}; raise train.epochs or train.steps")
    if world.on_main(lambda: over and folder.results.is_file()):
        if world.is_main:
            print(f"{folder.path} is complete at step {first}; out=... starts another run")
        return 0
    forward: nn.Module = compiled(model, world.device) if config.train.compile else model

    def take() -> None:
        before_writing()
        held.append(claim(folder, config, classes, parts, held[0]))

    world.on_main(take)
    if world.is_main:
        print(describe_run(config, start, model, labelled, schedule, world, parts), flush=True)
    log = Log(folder, config.log, state.progress, schedule, world.is_main, "")
    validations = MetricsFile(folder.validation, first) if world.is_main else None
    for line in warnings:
        log.say(f"warning: {line}")
    if first:
        log.say(f"going on from step {first} of {schedule.goal}")

    loader = rest_of(dataset, config, schedule, world, state.progress)
    if world.size > 1:
        forward = distributed.replicated(forward)
    criterion = objective(config, len(classes))

    def begin(step: int) -> None:
        seed_step(config.seed, step, world.rank)
        frozen.train()

    def loss(batch: dict) -> torch.Tensor:
        images, labels = (loop.to_device(batch[name], world.device) for name in ("image", "label"))
        found = criterion(forward, images, labels)
        average_statistics(model, world)
        return found

    def validation() -> None:
        checked = {"model": validate(model, config, labelled, world, workers)}
        if ema is not None:
            checked["ema"] = validate(ema.module, config, labelled, world, workers)
        world.on_main(lambda: note(checked))

    def note(checked: dict) -> None:
        step = state.progress.step
        row = {name: scores for name, (_, scores) in checked.items()}
        validations.write({"step": step, "epoch": round(schedule.epoch_at(step), 6), **row})
        points = {f"val/{k}_{n}": row[n][k] for n in row for k in ("top1", "balanced", "loss")}
        log.scalars({name: value for name, value in points.items() if value is not None}, step)
        log.say(f"step {step}: " + ", ".join(f"top-1 {100 * row[n]['top1']:.2f} % of the {n}" for n in row))
        if unreadable := row["model"]["unreadable"]:
            log.say(f"warning: {unreadable} of {len(labelled.val)} images of data.val are unreadable and left out")
        # The first of equals, so that a repeated run keeps the same.
        of = max(row, key=lambda name: row[name]["top1"])
        state.notes = {**state.notes, "latest": {**row, "step": step}}
        if state.notes.get("best", {"top1": -1.0})["top1"] < row[of]["top1"]:
            best = {"of": of, "step": step, **row[of]}
            state.notes = {**state.notes, "best": best}
            weights = ema.module if of == "ema" else model
            export.write_classifier(folder.path / "best.safetensors", weights, start, config, classes, best)
            export.write_tables(folder.path, checked[of][0], classes, best)

    def write_checkpoint() -> None:
        log.sync()
        validations.sync()
        payload = state.payload(config, len(dataset))
        checkpoint.save(folder.checkpoints, payload, config.checkpoint)

    hooks = loop.Hooks(
        loss, lambda: world.on_main(write_checkpoint), validation, config.eval.every, dataset.source.name, begin,
        stepped=(lambda: ema.update(model)) if ema is not None else (lambda: None),
    )  # fmt: skip
    try:
        yield state.progress
        ended_by = yield from loop.train(state, forward, loader, schedule, config, world, log, hooks, stop)
    finally:
        log.close()
        if validations is not None:
            validations.close()
    if ended_by:
        log.say(f"signal {ended_by}: saved at step {state.progress.step}; the same command goes on from there")
        return 128 + ended_by
    frozen.check()
    world.on_main(lambda: finish(config, folder, start, labelled, state, len(frozen), schedule.epochs, blocks))
    if world.is_main:
        print(next_commands(config, folder))
    return 0


def find_images(config: DownstreamConfig, world: distributed.World) -> Labelled:
    """The labelled images, the same on every rank. Raises UsageError when they or their classes are not as expected."""
    data, wanted = config.data, config.model.classes
    found = world.main_first(
        lambda: open_parts(data.train, data.val, config.model.in_chans, data.fraction, config.seed)
    )  # fmt: skip
    if wanted not in (None, len(found.classes)):
        raise UsageError(f"data.train={data.train} has {len(found.classes)} classes, and model.classes={wanted}")
    return found


def check_folder(folder: RunFolder, config: DownstreamConfig, classes: list[str]) -> None:
    """Raises UsageError when the folder holds another run, or one of other classes."""
    folder.check(config)
    held = folder.path / "classes.txt"
    if folder.config.is_file() and held.is_file() and held.read_text(errors="replace").splitlines() != classes:
        raise UsageError(
            f"{folder.path} holds a run with other classes than data.train has now; choose another out=..."
        )


def claim(folder: RunFolder, config: DownstreamConfig, classes: list[str], parts: list[dict], held: IO | None) -> IO:
    """Make the folder this run's, whose lock is held if it had a run; the lock. What never changes is written here."""
    lock = folder.claim(config, held, new=held is None)
    for name, text in (("classes.txt", "\n".join(classes) + "\n"), ("parameters.txt", groups.describe(parts))):
        write_whole(folder.path / name, lambda file, text=text: file.write(text.encode()))
    return lock


def averaged(model: nn.Module, decay: float):
    """timm's moving average of a model, all of whose tensors it follows."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay)


def finish(
    config: DownstreamConfig, folder: RunFolder, start: Start, labelled: Labelled, state: TrainState, frozen: int,
    epochs: float, blocks: float | None,
) -> None:  # fmt: skip
    """The last weights, their average, the curve, and results.json, whose presence tells that the run is complete."""
    latest = state.notes["latest"]
    for name, model, of in (("last", state.model, "model"), ("ema", state.ema, "ema")):
        if model is not None:
            path = folder.path / f"{name}.safetensors"
            export.write_classifier(
                path, model, start, config, labelled.classes, {"step": latest["step"], **latest[of]}
            )
    title = f"{start.spec.name or start.spec.title}: {config.data.train}"
    export.draw_curve(folder.path, title)
    found = {
        "format": FORMAT,
        "model": start.spec.name,
        "init": config.init,
        "blocks_trained": blocks,
        "frozen_tensors_unchanged": frozen,
        "train": config.data.train,
        "val": config.data.val,
        "split": labelled.describe(),
        "fraction": config.data.fraction,
        "epochs": epochs,
        "steps": state.progress.step,
        "skipped_steps": state.progress.skipped,
        "seed": config.seed,
        "last": latest["model"],
        "ema": latest.get("ema"),
        "best": state.notes["best"],
    }
    export.write_json(folder.results, found)


if __name__ == "__main__":
    sys.exit(main())
