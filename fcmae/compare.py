"""Compare ConvNets and ViTs as masked autoencoders: `python -m fcmae.compare CONFIG.yaml [key=value ...]`.

The main path, top to bottom: configuration -> arms -> everything checked -> each trained on the same images, crops and
masks -> measured -> report.json -> report.html. Every arm is an ordinary pretraining run in out/arms/NAME.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from fcmae import config as settings
from fcmae.cli import run_command
from fcmae.comparison import report
from fcmae.comparison.evaluate import SHEET, evaluate, up_to_date
from fcmae.comparison.settings import FREE_KEYS, CompareConfig, arms_of, check_alike
from fcmae.data import MaskedImages
from fcmae.downstream.labelled import Labelled, open_labelled
from fcmae.errors import UsageError
from fcmae.files import write_whole
from fcmae.pretrain import build_dataset, build_model, compiled, steps_of
from fcmae.schema import Config
from fcmae.train import checks, distributed
from fcmae.train.init import start_from
from fcmae.train.lock import locked
from fcmae.train.loop import StopSignal
from fcmae.train.run_folder import RunFolder
from fcmae.train.schedule import make_schedule
from fcmae.train.state import Progress


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input, 75 try again, 128 + n saved at signal n."""
    given = sys.argv[1:] if argv is None else argv
    rest = [a for a in given if a != "--arms-in-turn"]
    return run_command("fcmae.compare", CompareConfig, compare, [*rest, *["arms_in_turn=true"] * (rest != given)])


def compare(config: CompareConfig) -> int:
    """Compare as configured; see `main` for the result. Raises UsageError for bad input."""
    arms = arms_of(config)
    labelled: list[Labelled] = []  # rank 0 alone evaluates
    held: list[IO] = []  # the folder's lock, until this function ends
    with distributed.joined(config) as world:
        dataset = check(config, arms, world)
        world.on_main(lambda: labelled.extend(find_labelled(config)))
        world.on_main(lambda: held.append(claim(config)))
        status, trained = train(config, arms, dataset, world)
    if status or not world.is_main:
        return status
    out = Path(config.out)
    if not trained and up_to_date(out / "report.json", config) and (out / "report.html").is_file():
        print(f"the comparison is complete: {out / 'report.html'}")
        return 0
    found = evaluate(config, arms, dataset, next(iter(labelled), None), world.device, world.size)
    sheet = (out / SHEET).read_bytes() if found["reconstructions"] else None
    write_whole(out / "report.html", lambda file: file.write(report.html(found, sheet).encode()))
    # Last: that it is of these settings tells that both are.
    write_whole(out / "report.json", lambda file: file.write(json.dumps(found, indent=1, allow_nan=False).encode()))
    print("\n".join(report.summary(found)))
    print(f"look: {out / 'report.html'}, every figure of it in {out / 'report.json'}")
    return 0


def check(config: CompareConfig, arms: dict[str, Config], world: distributed.World) -> MaskedImages:
    """The images that all arms share. Nothing is written before every arm has been found able to run.

    Raises UsageError for whatever would stop one of them, or make them see or be measured by different things.
    """
    world.on_main(lambda: check_folder(config))
    models, schedules = {}, {}
    dataset: MaskedImages | None = None
    for name, arm in arms.items():
        try:
            checks.check_backend(arm, world.device)
            models[name] = build_model(arm)
            if arm.init is not None:
                start_from(models[name], arm.init)
            if dataset is None:
                dataset = world.main_first(lambda: build_dataset(arm, models[name]))  # noqa: B023 - called at once
            schedules[name] = make_schedule(arm.train, len(dataset), world.size)
            arm.train.accum_steps, arm.train.effective_batch = (
                schedules[name].accum_steps,
                schedules[name].effective_batch,
            )
            if arm.train.compile:
                compiled(models[name], world.device)
            world.on_main(lambda: check_run(arm))  # noqa: B023
        except UsageError as error:
            raise UsageError(f"arm {name}: {error}") from None
    check_alike(models, schedules)
    return dataset


def check_run(arm: Config) -> None:
    """Raises UsageError when an arm's folder holds another run, or no checkpoint there can be read."""
    folder = RunFolder(Path(arm.out))
    folder.check(arm)
    folder.find_checkpoint(None)


def check_folder(config: CompareConfig) -> None:
    """Raises UsageError when the folder holds something else than this comparison; its arms have their own checks."""
    out = Path(config.out)
    if not (out / "config.yaml").is_file():
        foreign = [name for name in ("arms", "report.json", "report.html") if (out / name).exists()]
        if foreign:
            raise UsageError(f"{out} has {foreign[0]} but no config.yaml; choose another folder with out=...")
        return
    try:  # settings that it did not know yet were what they are by default
        held = settings.override(CompareConfig(), settings.read_yaml(out / "config.yaml"), str(out / "config.yaml"))
    except UsageError:
        raise UsageError(f"{out} holds something else, no comparison; choose another folder with out=...") from None
    apart = ({**settings.to_dict(c), "arms": {}} for c in (held, config))
    changed = settings.differences(*apart, FREE_KEYS)
    if changed:
        raise UsageError(
            f"{out} holds something else ({settings.shown(changed)}); go on with its own settings, choose another "
            f"folder with out=..., or remove it"
        )


def claim(config: CompareConfig) -> IO:
    """Make the folder this comparison's, and hold it for this process until the returned file is closed.

    Raises UsageError when it cannot be written, or when another process holds it.
    """
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = locked(out / ".lock")
        settings.write_yaml(config, out / "config.yaml")
        return lock
    except OSError as error:
        raise UsageError(f"cannot write into out={out}: {error.strerror}; choose another folder") from None


def find_labelled(config: CompareConfig) -> list[Labelled]:
    """The labelled images, if any are asked for. Raises UsageError when there are none."""
    e = config.evaluate
    if config.data.labelled is None:
        return []
    return [open_labelled(config.data.labelled, config.model.in_chans, config.seed, e.val_share, e.labelled_images)]


def train(
    config: CompareConfig, arms: dict[str, Config], dataset: MaskedImages, world: distributed.World
) -> tuple[int, bool]:
    """Train every arm to its end, one after another or in turn: the exit status, and whether any was left to do."""
    stop = StopSignal()
    runs = [ArmRun(name, steps_of(arm, world, stop, dataset, name), world.device) for name, arm in arms.items()]
    trained = False
    for group in [runs] if config.arms_in_turn else [[run] for run in runs]:
        for run in group:
            run.advance()
        with stop:
            while waiting := [run for run in group if run.status is None]:
                trained = True
                # Whose share of the budget is least: also where a kill left one arm behind the other.
                min(waiting, key=lambda run: run.used(config)).advance()
        if ended := [run.status for run in group if run.status]:
            return ended[0], trained
    return 0, trained


class ArmRun:
    """One arm's run with a random state of its own, so that it computes the same alone and in turn with others."""

    def __init__(self, name: str, steps: Generator[Progress, None, int], device: torch.device):
        self.name, self.steps, self.device = name, steps, device
        self.status: int | None = None  # the exit status, once the run has ended
        self.progress = Progress()
        self._rng: tuple | None = None

    def used(self, config: CompareConfig) -> float:
        """How much of the budget it has had."""
        return self.progress.step if config.budget.seconds is None else self.progress.seconds

    def advance(self) -> None:
        """One step, the first time everything before it. Raises UsageError naming the arm."""
        with self._own_rng():
            try:
                self.progress = next(self.steps)
            except StopIteration as end:
                self.status = end.value
            except UsageError as error:
                raise type(error)(f"arm {self.name}: {error}") from None

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        before = self._read_rng()
        if self._rng is not None:
            self._write_rng(self._rng)
        yield
        self._rng = self._read_rng()
        self._write_rng(before)

    def _read_rng(self) -> tuple:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def _write_rng(self, states: tuple) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], self.device)


if __name__ == "__main__":
    sys.exit(main())
