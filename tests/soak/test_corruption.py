"""Damaged files of every kind: refused in one line, or stepped over, or what is read is the original, bit for bit."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import labelled_runs
import small_runs
from fcmae.checksum import write_safetensors
from fcmae.errors import UsageError
from fcmae.train import checkpoint
from fcmae.weights import load_tensors, read_weights
from soak import damage

pytestmark = pytest.mark.soak
SEED = 20_301
STEPS, EVERY = 6, 2
NEWEST = f"step_{STEPS - EVERY:09d}.pt"


class Place:
    """Runs to damage. Each was left after STEPS - EVERY steps, with checkpoints EVERY apart, and can go on to STEPS."""

    def __init__(self, folder: Path):
        self.folder = folder
        pictures = small_runs.make_pictures(folder / "pictures", 24)
        (folder / "pretrain.yaml").write_text(small_runs.CONFIG)
        labelled_runs.make_place(folder / "labelled")
        few = [f"checkpoint.every={EVERY}", "checkpoint.keep_last=9", "train.warmup_epochs=0"]
        self.pretraining = [
            str(folder / "pretrain.yaml"), f"data.source={pictures}", *few, f"train.steps={STEPS}",
            "log.collapse_every=1",
        ]  # fmt: skip
        self.finetuning = [
            str(folder / "labelled" / "config.yaml"), *few, f"train.steps={STEPS}", "eval.every=0.01",
            *labelled_runs.PLAIN,
        ]  # fmt: skip
        self.init = f"init={folder / 'labelled' / 'tiny.pt'}"
        self.whole, self.tuned = folder / "whole", folder / "tuned"
        for out, more in (
            (self.whole, []),
            (folder / "other", ["seed=1"]),
            (folder / "wider", ["model.dims=[8,12,16,32]"]),
        ):
            assert main("pretrain", [*self.pretraining, f"out={out}", *more])[0] == 0
        assert main("finetune", [*self.finetuning, f"out={self.tuned}", self.init])[0] == 0

    def left(self, run: Path, out: Path) -> Path:
        """A copy of a run as it lay after its last checkpoint but one, with lines of a step beyond it."""
        shutil.copytree(run, out)
        (out / "checkpoints" / f"step_{STEPS:09d}.pt").unlink()
        for name in ("encoder.safetensors", "last.safetensors", "ema.safetensors", "results.json"):
            (out / name).unlink(missing_ok=True)
        return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("corruption"))


def main(command: str, given: list[str]) -> tuple[int, str, str]:
    """A command's `main` in this process: status, standard output and error. An exception is the test's failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = importlib.import_module(f"fcmae.{command}").main(given)
    return status, out.getvalue(), err.getvalue()


def process(command: str, given: list[str]) -> tuple[int, str, str]:
    """The same as a command of its own."""
    done = subprocess.run(
        [sys.executable, "-m", f"fcmae.{command}", *given],
        env=small_runs.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def one_line(text: str, where: str) -> None:
    """Fail unless an error is one line for people."""
    assert text.strip() and len(text.strip().splitlines()) == 1 and "Traceback" not in text, f"{where}: {text!r}"


def refusal(work: Callable[[], object], where: str) -> tuple[object, str | None]:
    """What `work` returns, or the one line that it refuses with."""
    try:
        return work(), None
    except UsageError as error:
        one_line(str(error), where)
        return None, str(error)


def test_damaged_files_never_load_as_something_else(place, tmp_path, often, figures):
    counts, rng = Counter(), random.Random(SEED)
    kinds = {
        "pretraining": place.whole / "checkpoints" / NEWEST,
        "fine-tuning": place.tuned / "checkpoints" / NEWEST,
        "encoder": place.whole / "encoder.safetensors",
        "classifier": place.tuned / "best.safetensors",
    }
    originals = {name: path.read_bytes() for name, path in kinds.items()}
    states = {name: read_weights(path).state for name, path in kinds.items()}
    payloads = {name: checkpoint.read(path) for name, path in kinds.items() if path.suffix == ".pt"}
    for i in range(often(1200, 72)):
        name, how = list(kinds)[i % 4], damage.DAMAGES[i // 4 % len(damage.DAMAGES)]
        data = how(originals[name], rng)
        where = f"file {i} of seed {SEED}: {name}, {how.__name__}"
        path = tmp_path / kinds[name].name
        path.write_bytes(data)
        weights, refused = refusal(lambda path=path: read_weights(path), where)
        if refused is None:
            small_runs.assert_same(weights.state, states[name], where)
        if name in payloads:
            older = tmp_path / f"step_{EVERY:09d}.pt"
            if not older.exists():
                shutil.copy(kinds[name].with_name(older.name), older)
            newest, passed_over = checkpoint.find_newest(tmp_path)
            assert newest in (path, older) and len(passed_over) == (newest == older), where
            for line in passed_over:
                one_line(line, where)
            if newest == path:
                small_runs.assert_same(checkpoint.read(path), payloads[name], where)
            refused = refused if newest == path else passed_over[0]
        counts["damaged"] += data != originals[name]
        counts["refused_or_stepped_over"] += refused is not None
        counts["read_bit_for_bit"] += refused is None
        path.unlink()
    assert counts["refused_or_stepped_over"] > counts["damaged"] * 0.7
    figures("damaged_files", **counts)


def test_every_bit_of_a_small_safetensors_file(place, tmp_path, often, figures):
    """A flip of any bit: the checksum finds those that safetensors itself takes for other numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator) for n, s in (("a.weight", (2, 3)), ("a.bias", (2,)))}
    path = tmp_path / "small.safetensors"
    write_safetensors(path, tensors)
    data, counts = path.read_bytes(), Counter()
    for place_of_bit in range(0, 8 * len(data), often(1, 5)):
        changed = bytearray(data)
        changed[place_of_bit // 8] ^= 1 << place_of_bit % 8
        path.write_bytes(changed)
        found, refused = refusal(lambda: load_tensors(path), f"bit {place_of_bit}")
        if refused is None:
            assert set(found) == set(tensors) and all(torch.equal(found[n], tensors[n]) for n in found), place_of_bit
        counts["refused" if refused else "read_bit_for_bit"] += 1
    figures("bits_of_safetensors", **counts)


def test_files_that_would_run_code(place, tmp_path, often, figures):
    marker, counts = tmp_path / "ran-code", Counter()
    attacks = damage.payloads(place.whole / "checkpoints" / NEWEST, marker)
    older = tmp_path / f"step_{EVERY:09d}.pt"
    shutil.copy(place.whole / "checkpoints" / older.name, older)
    for i, (name, data) in enumerate(attacks.items()):
        for suffix in (".pt", ".pth", ".bin", ".safetensors"):
            path = tmp_path / f"attack{suffix}"
            path.write_bytes(data)
            weights, refused = refusal(lambda path=path: read_weights(path), name)
            assert refused or name == "a code/ entry alone", name
            path.unlink()
            counts["files"] += 1
        newest = tmp_path / NEWEST
        newest.write_bytes(data)
        assert checkpoint.find_newest(tmp_path)[0] == (newest if name == "a code/ entry alone" else older), name
        for given in (["convert", str(newest), str(tmp_path / "x.pt"), "--to", "fcmae"],
                      ["pretrain", *place.pretraining, f"out={tmp_path / 'x'}", f"resume={newest}"],
                      ["pretrain", *place.pretraining, f"out={tmp_path / 'x'}", f"init={newest}"]):  # fmt: skip
            if name != "a code/ entry alone" and i % often(1, 9) == 0:
                status, _, err = main(given[0], given[1:])
                assert status == 2, name
                one_line(err, name)
                counts["commands"] += 1
        assert not marker.exists(), f"{name} ran code"
    for name in ("os.system", "exec", "open"):  # each would have: the test can fail
        path = tmp_path / "real.pt"
        path.write_bytes(attacks[f"{name}, alone, saved by torch"])
        with contextlib.suppress(Exception):
            torch.load(path, weights_only=False)
        assert marker.exists(), name
        marker.unlink()
    figures("files_with_code", attacks=len(attacks), **counts)


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_damaged_text_files_of_a_run_that_goes_on(place, tmp_path, often, figures):
    """config.yaml: refused, or the same run goes on. *.jsonl: the run goes on to the same end, whole lines stay."""
    counts, rng = Counter(), random.Random(SEED)
    runs = {
        "pretrain": (
            place.whole,
            place.pretraining,
            ("metrics.jsonl", "times.jsonl", "collapse.jsonl"),
            "encoder.safetensors",
        ),
        "finetune": (
            place.tuned,
            [*place.finetuning, place.init],
            ("metrics.jsonl", "validation.jsonl"),
            "last.safetensors",
        ),
    }
    cases = [(c, name) for c, (_, _, names, _) in runs.items() for name in (*names, "config.yaml")]
    for i in range(often(280, 7)):
        command, name = cases[i % len(cases)]
        run, given, _, last = runs[command]
        how = damage.DAMAGES[i // len(cases) % len(damage.DAMAGES)]
        out = place.left(run, tmp_path / "run")
        where = f"file {i} of seed {SEED}: {command}, {name}, {how.__name__}"
        data = (out / name).read_bytes()
        damaged = how(data, rng)
        (out / name).write_bytes(damaged)
        status, said, err = main(command, [*given, f"out={out}"])
        if status:
            assert status == 2 and name == "config.yaml", where + err
            one_line(err, where)
            assert (out / name).read_bytes() == damaged, f"{where}: written over"
        else:
            assert (out / last).read_bytes() == (run / last).read_bytes(), where
            counts["went_on_to_the_same_weights"] += 1
        if status == 0 and name.endswith(".jsonl"):
            found = lines_of(out / name)
            assert all("step" in json.loads(line) for line in found), where
            good = set(lines_of(run / name))
            reached = STEPS - EVERY - (name == "collapse.jsonl")
            kept = [x for x in damaged.splitlines(keepends=True) if x in good and json.loads(x)["step"] <= reached]
            assert [x for x in found if x in kept] == kept, where
            lost = [x for x in damaged.splitlines(keepends=True)[:-1] if not _is_row(x)]
            assert bool(lost) <= ("damaged" in said), f"{where}: {said}"
        counts["files"] += 1
        counts["refused"] += status == 2
        shutil.rmtree(out)
    figures("damaged_text_of_runs", **counts)


def _is_row(line: bytes) -> bool:
    try:
        return "step" in json.loads(line)
    except (ValueError, TypeError):
        return False


def test_checkpoints_of_another_run_or_model(place, tmp_path, figures):
    count = 0
    for other, command, given in (
        (place.folder / "other", "pretrain", place.pretraining),
        (place.folder / "wider", "pretrain", place.pretraining),
        (place.tuned, "pretrain", place.pretraining),
        (place.whole, "finetune", [*place.finetuning, place.init]),
    ):
        strange = other / "checkpoints" / f"step_{STEPS:09d}.pt"
        out = place.left(place.whole if command == "pretrain" else place.tuned, tmp_path / "run")
        shutil.copy(strange, out / "checkpoints" / strange.name)
        for ask in ([f"out={out}"], [f"out={tmp_path / 'new'}", f"resume={strange}"]):
            before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
            status, _, err = main(command, [*given, *ask])
            assert status == 2, f"{strange} in {command}"
            one_line(err, str(strange))
            assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
            count += 1
        shutil.rmtree(out)
    figures("checkpoints_of_others", files=count, refused=count)


def test_what_is_whole_but_lacks_a_part(place, tmp_path):
    good = torch.load(place.whole / "checkpoints" / NEWEST, weights_only=True)
    for part in ("config", "dataset_size", "model", "optimizer", "scaler", "rng"):
        path = tmp_path / "part.pt"
        torch.save({key: value for key, value in good.items() if key != part}, path)
        status, _, err = main("pretrain", [*place.pretraining, f"out={tmp_path / 'run'}", f"resume={path}"])
        assert status == 2 and "lacks" in err and part in err
        one_line(err, part)


def test_commands_on_damaged_files(place, tmp_path, often, figures):
    """Every command that reads weights: status 2 and one line, or the result of the whole file or the one before."""
    counts, rng = Counter(), random.Random(SEED)
    victim = {"run": tmp_path / "run", "pt": tmp_path / "w.pt", "safetensors": tmp_path / "w.safetensors"}
    images = ["--images", str(place.folder / "pictures"), "--count", "2"]
    out = tmp_path / "out"
    probe = [
        str(place.folder / "labelled" / "config.yaml"),
        "--mode",
        "knn",
        "probe.neighbours=[3]",
        "ema.enabled=false",
    ]
    encoder, last = out / "encoder.safetensors", out / "last.safetensors"
    timm, ours = tmp_path / "out.safetensors", tmp_path / "out.pt"
    begin = {kind: f"init={path}" for kind, path in victim.items()}
    pretrain, finetune = [*place.pretraining, f"out={out}"], [*place.finetuning, f"out={out}"]
    filters = ["--what", "filters", "--out", str(out), *images]
    # command, what is damaged, words, what is left of it
    cases = [
        ("pretrain", "run", [*place.pretraining, f"out={victim['run']}"], victim["run"] / encoder.name),
        ("pretrain", "pt", [*pretrain, f"resume={victim['pt']}"], encoder),
        ("pretrain", "pt", [*pretrain, begin["pt"]], encoder),
        ("pretrain", "safetensors", [*pretrain, begin["safetensors"]], encoder),
        ("finetune", "pt", [*finetune, begin["pt"]], last),
        ("finetune", "safetensors", [*finetune, begin["safetensors"]], last),
        ("convert", "pt", [str(victim["pt"]), str(timm)], timm),
        ("convert", "run", [str(victim["run"]), str(timm)], timm),
        ("convert", "safetensors", [str(victim["safetensors"]), str(ours), "--to", "fcmae"], ours),
        ("probe", "safetensors", [*probe, f"out={out}", begin["safetensors"]], out / "results.json"),
        ("analyze", "run", [str(victim["run"]), *filters], out / "filters.json"),
        ("analyze", "safetensors", [str(victim["safetensors"]), *filters], out / "filters.json"),
    ]

    def prepared(kind: str, how: Callable | None, newest: bool = True) -> None:
        """The victims anew, the one of this kind damaged; without its newest checkpoint, if so asked."""
        for path in (*victim.values(), out, timm, ours):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        place.left(place.whole, victim["run"])
        shutil.copy(place.whole / "checkpoints" / NEWEST, victim["pt"])
        shutil.copy(place.whole / "encoder.safetensors", victim["safetensors"])
        target = victim["run"] / "checkpoints" / NEWEST if kind == "run" else victim[kind]
        if not newest:
            target.unlink()
        if how is not None:
            target.write_bytes(how(target.read_bytes(), rng))

    cases = cases[:: often(1, 3)]
    expected = {}
    for n, (command, kind, given, left) in enumerate(cases):
        for newest in (True, False) if kind == "run" else (True,):
            prepared(kind, None, newest)
            status, _, err = main(command, given)
            assert status == 0, (command, err)
            expected[n, newest] = left.read_bytes()
    rounds, apart = often(len(cases) * len(damage.DAMAGES) * 2, len(cases)), often(5, 6)
    for i in range(rounds):
        n, how = i % len(cases), damage.DAMAGES[(i + i // len(cases)) % len(damage.DAMAGES)]
        command, kind, given, left = cases[n]
        prepared(kind, how)
        run = process if i % apart == 0 else main
        where = f"case {i} of seed {SEED}: {command} {kind}, {how.__name__}"
        status, said, err = run(command, given)
        assert "Traceback" not in err + said, f"{where}: {err}"
        counts["as_processes"] += run is process
        counts["refused"] += status == 2
        if status == 2:
            one_line(err, where)
            assert not left.exists(), f"{where}: {left} was written"
            assert kind != "run", f"{where}: an older checkpoint was there; {err}"
            continue
        assert status == 0, f"{where}: {status} {err}"
        found = left.read_bytes()
        if found == expected[n, True] and not (kind == "run" and "falling back" in said + err):
            counts["as_of_the_whole_file"] += 1
            continue
        assert found == expected[n, False], f"{where}: another result than of either checkpoint"
        assert run is main or "falling back" in said + err, f"{where}: nothing said: {said} {err}"
        counts["as_of_the_checkpoint_before"] += 1
    figures("commands_on_damaged_files", commands=rounds, **counts)
