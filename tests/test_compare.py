"""Comparing arms: the same data for all, resuming, the figures of the report recomputed, the page."""

import html
import json
import re
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from fcmae import config as settings
from fcmae.analysis.cosine_distance import cosine_distance
from fcmae.compare import main
from fcmae.comparison import report
from fcmae.comparison.settings import arms_of
from fcmae.downstream import representation
from fcmae.downstream.labelled import CentreCrops, open_labelled
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.pretrain import build_dataset, build_model
from fcmae.pretrain import main as pretrain
from fcmae.schema import Config
from fcmae.train.schedule import make_schedule
from fcmae.weights import read_checkpoint
from helpers import close
from small_comparison import ARMS, arguments, configured, labelled, make_place
from small_runs import assert_same_run, environment, final_state, metrics


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums in the order in which the runs in processes of their own have them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def done(place):
    """A comparison with its arms in turn, what each arm was given at each training step, and its report."""
    seen: dict[str, list] = {}
    forward = MaskedAutoencoder.forward

    def watched(model, images, mask=None):
        if model.training and torch.is_grad_enabled():
            seen.setdefault(type(model).__name__, []).append((images.clone(), mask.mask.clone()))
        return forward(model, images, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedAutoencoder, "forward", watched)
        assert main([*arguments(place, place / "done", labelled(place)), "--arms-in-turn"]) == 0
    return place / "done", seen, json.loads((place / "done" / "report.json").read_text())


def curve_of(out, name) -> dict[str, list]:
    """A curve as the run's own files have it."""
    times = [json.loads(line) for line in (out / "arms" / name / "times.jsonl").read_text().splitlines()]
    rows = metrics(out / "arms" / name)
    assert [t["step"] for t in times] == [r["step"] for r in rows]
    return {
        "step": [r["step"] for r in rows],
        "loss": [r["loss"] for r in rows],
        **{key: [t[key] for t in times] for key in ("seconds", "step_seconds", "waited")},
    }


def test_both_arms_were_given_the_same_crops_and_masks(done):
    _, seen, _ = done
    assert set(seen) == {"FCMAE", "MAE"} and len(seen["FCMAE"]) == len(seen["MAE"]) == 12
    for (image, mask), (other_image, other_mask) in zip(seen["FCMAE"], seen["MAE"], strict=True):
        assert torch.equal(image, other_image) and torch.equal(mask, other_mask)
        assert image.shape == (8, 3, 64, 96) and mask.shape == (8, 2, 3)
    assert not torch.equal(seen["MAE"][0][0], seen["MAE"][1][0])


def test_in_turn_or_one_after_another_or_alone_the_arms_are_the_same(place, done, tmp_path):
    assert main(arguments(place, tmp_path / "one", labelled(place), "evaluate.images=0")) == 0
    for name in ARMS:
        assert_same_run(tmp_path / "one" / "arms" / name, done[0] / "arms" / name)
    written = done[0] / "arms" / "vit" / "config.yaml"
    assert pretrain([str(written), f"out={tmp_path / 'alone'}"]) == 0
    assert_same_run(tmp_path / "alone", done[0] / "arms" / "vit")
    assert not (tmp_path / "one" / "reconstructions.png").exists()


@pytest.mark.slow  # in turn: tests/soak/test_crash.py
def test_killed_and_continued_the_arms_are_the_same(place, done, tmp_path):
    out, settings_ = tmp_path / "killed", [labelled(place), "arms_in_turn=false", "checkpoint.every=2"]
    command = [sys.executable, "-m", "fcmae.compare", *arguments(place, out, *settings_)]
    for goal in (5, 9):  # lines of either arm
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        files = [out / "arms" / name / "metrics.jsonl" for name in ARMS]
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if max(len(f.read_bytes().splitlines()) if f.exists() else 0 for f in files) >= goal:
                break
            time.sleep(0.002)
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        process.kill()
        process.communicate()
    assert not (out / "report.json").exists()
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "going on from step" in again.stdout
    for name in ARMS:
        assert_same_run(out / "arms" / name, done[0] / "arms" / name)
    found = json.loads((out / "report.json").read_text())
    for name in ARMS:  # and so is what they learned
        assert found["arms"][name]["representation"] == done[2]["arms"][name]["representation"]


def test_the_same_command_again_does_nothing_and_another_question_is_answered(place, done, capsys):
    out = done[0]
    files = [out / name for name in ("report.json", "report.html")]
    before = [file.read_bytes() for file in files]
    given = arguments(place, out, labelled(place), "arms_in_turn=true")
    assert main(given) == 0
    assert "the comparison is complete" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == before
    worst = max(arm["curve"]["smooth"][0] for arm in done[2]["arms"].values())
    assert main([*given, f"time_to_loss={worst}"]) == 0
    asked = json.loads((out / "report.json").read_text())
    assert asked["time_to_loss"] == {"loss": worst, "given": True}
    assert [arm["to_loss"]["step"] for arm in asked["arms"].values()].count(1) >= 1
    assert "complete" not in capsys.readouterr().out.splitlines()[-1]
    for file, content in zip(files, before, strict=True):
        file.write_bytes(content)


def test_curves_pace_and_time_to_loss(done):
    out, _, found = done
    finals = {}
    for name in ARMS:
        arm, own = found["arms"][name], curve_of(out, name)
        assert {k: arm["curve"][k] for k in ("step", "loss", "seconds")} == {
            k: own[k] for k in ("step", "loss", "seconds")
        }
        assert arm["averaged_over"] == 1 and arm["curve"]["smooth"] == own["loss"]  # 2 % of 12 steps
        assert own["seconds"] == pytest.approx(np.cumsum(own["step_seconds"]).tolist())
        assert arm["seconds"] == own["seconds"][-1] == final_state(out / "arms" / name)["seconds"]
        assert arm["images_per_second"] == pytest.approx(8 / statistics.median(own["step_seconds"]))
        assert arm["data_wait_share"] == pytest.approx(sum(own["waited"]) / sum(own["step_seconds"]))
        assert (arm["steps"], arm["images"], arm["images_per_step"]) == (12, 96, 8)
        finals[name] = own["loss"][-1]
    assert found["time_to_loss"] == {"loss": max(finals.values()), "given": False}
    for name in ARMS:
        own = curve_of(out, name)
        first = next(i for i, loss in enumerate(own["loss"]) if loss <= max(finals.values()))
        assert found["arms"][name]["to_loss"] == {"step": first + 1, "seconds": own["seconds"][first]}


def test_parameters_and_memory(place, done):
    for name, arm in arms_of(configured(place)).items():
        model, found = build_model(arm), done[2]["arms"][name]
        assert found["parameters"]["whole"] == sum(p.numel() for p in model.parameters())
        decoding = ("decoder", "mask_token", "proj.", "pred.")
        encoder = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(decoding))
        assert found["parameters"]["encoder"] == encoder
        held = 16 * found["parameters"]["whole"]  # weights, gradients and AdamW's two moments
        assert found["peak_memory"]["bytes"] > held and found["peak_memory"]["batch_size"] == 8
        assert "resident memory" in found["peak_memory"]["what"]


def test_the_report_s_representations_recomputed(place, done):
    """From the arms' checkpoints: features of each validation image one at a time, and the first block's distance."""
    out, _, found = done
    config = configured(place, labelled(place))
    arms = arms_of(config)
    parts = open_labelled(str(place / "pictures"), 3, config.seed, 0.2, 50_000)
    assert (len(parts.train), len(parts.val)) == (32, 8)
    for name, arm in arms.items():
        torch.manual_seed(arm.seed)
        models = {"random": build_model(arm), "trained": build_model(arm)}
        models["trained"].load_state_dict(read_checkpoint(out / "arms" / name), strict=True)
        for state, model in models.items():
            x, y = [], []
            with torch.no_grad():
                for files, into in ((parts.train, x), (parts.val, y)):
                    for image, _ in CentreCrops(files, (64, 96), 3, None, None):
                        encoded = model.encode(image[None])
                        into.append(encoded[0].mean((1, 2)) if name == "convnext" else encoded[0, 1:].mean(0))
            labels = [torch.tensor([label for _, label in files]) for files in (parts.train, parts.val)]
            predicted = representation.knn(torch.stack(x), labels[0], torch.stack(y), 4, [3], 0.07)[3]
            reported = found["arms"][name]["representation"][state]
            assert reported["knn"] == representation.accuracy(predicted, labels[1])
            block = model.encoder.stages[0].blocks[0] if name == "convnext" else model.blocks[0]
            kept = []
            block.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
            dataset = build_dataset(arm, model)
            chosen = np.linspace(0, 39, 10).round().astype(int).tolist()
            with torch.no_grad():
                model.encode(torch.stack([dataset[(0, i)]["image"] for i in chosen]))
            maps = kept[0].flatten(1, 2) if name == "convnext" else kept[0][:, 1:]
            layers = reported["cosine_distance"]["layers"]
            close(torch.tensor(layers[0]["distance"]), cosine_distance(maps).mean(), 1e-6)
            assert [layer["layer"] for layer in layers] == (
                ["stage 1 block 1", "stage 2 block 1", "stage 3 block 1", "stage 3 block 2", "stage 4 block 1"]
                if name == "convnext"
                else ["block 1", "block 2", "block 3"]
            )
            mean = statistics.fmean(layer["distance"] for layer in layers)
            assert reported["cosine_distance"]["mean"] == pytest.approx(mean)


def test_the_page_has_every_figure_and_needs_no_network(done):
    out, _, found = done
    page = (out / "report.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    rows = dict(report.table(found))
    assert len(rows) == 23
    for what, values in rows.items():
        assert what in text, what
        for value in values:
            assert value in text, (what, value)
    for name in ARMS:
        arm = found["arms"][name]
        for figure in (f"{arm['final_loss']:.4f}", f"{arm['seconds']:.1f}", f"{arm['flops']['whole'] / 1e9:#.3g}"):
            assert figure in text
        for state in ("trained", "random"):
            assert f"{100 * arm['representation'][state]['knn']['top1']:.1f} %" in text
            for layer in arm["representation"][state]["cosine_distance"]["layers"]:
                assert f"{layer['distance']:.4f}" in text
    for sentence in report.summary(found):
        assert sentence in text
    assert (
        "http:" not in page and "https:" not in page and "//" not in re.sub(r"base64,[^\"]*|<pre>.*?</pre>", "", page)
    )
    assert not re.search(r"<(script|link|iframe|object)|@import|url\((?!#)", page)
    assert page.count("<svg") == 3 and page.count("data:image/png;base64,") == 1


def test_the_page_s_figures_are_those_of_the_json(done):
    _, _, found = done
    changed = json.loads(json.dumps(found))
    changed["arms"]["vit"]["final_loss"] = 0.12345
    changed["arms"]["vit"]["images_per_second"] = 98765.0
    changed["arms"]["convnext"]["representation"]["random"]["probe"]["top1"] = 0.98765
    changed["labelled"]["val"] = 54321
    page = report.html(changed, None)
    for figure in ("vit ends at the lowest loss, 0.1235", "98,765 img/s", "98.8 %", "54,321 images"):
        assert figure in html.unescape(page)
    before = report.html(found, None)
    curve = re.compile(r'<path d="M [^"]*"')
    assert curve.findall(report.html(found, None)) == curve.findall(before)
    changed["arms"]["vit"]["curve"]["loss"][3] = 9.0
    assert curve.findall(report.html(changed, None)) != curve.findall(before)


@pytest.mark.slow
def test_without_labels_there_is_no_accuracy(place, tmp_path):
    assert main(arguments(place, tmp_path / "out", "budget.steps=1", "train.warmup_epochs=0")) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["labelled"] is None and "knn" not in found["arms"]["vit"]["representation"]["trained"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "kNN" not in page and page.count("<svg") == 2


@pytest.mark.slow
def test_a_budget_of_seconds(place, tmp_path):
    """Each arm ends with the first step beyond it, its learning rate follows the clock, and a resumed arm has only
    what is left."""
    out, seconds = tmp_path / "timed", 2.0
    given = arguments(
        place, out, "budget.steps=null", f"budget.seconds={seconds}", "train.epochs=4", "checkpoint.keep_last=9"
    )
    assert main([*given, "--arms-in-turn"]) == 0
    for name in ARMS:
        arm, own = out / "arms" / name, curve_of(out, name)
        assert own["seconds"][-2] < seconds <= own["seconds"][-1] == final_state(arm)["seconds"]
        config = settings.load(Config, arm / "config.yaml", [])
        schedule = make_schedule(config.train, 40, 1)
        rates = [row["lr"] for row in metrics(arm)]
        assert rates == [schedule.lr_at(0, used) for used in [0.0, *own["seconds"][:-1]]]
        assert rates[0] == 0 and max(rates) <= 1e-3 and rates[-1] < max(rates)
    resumed, before = out / "arms" / "vit", curve_of(out, "vit")
    (resumed / "encoder.safetensors").unlink()
    for path in sorted((resumed / "checkpoints").iterdir())[1:]:
        path.unlink()
    assert main([*given, "--arms-in-turn"]) == 0
    after = curve_of(out, "vit")
    assert after["seconds"][:4] == before["seconds"][:4] and after["seconds"] != before["seconds"]
    assert after["seconds"][-2] < seconds <= after["seconds"][-1]
    assert after["step"] == list(range(1, len(after["step"]) + 1))


def test_a_folder_with_something_else_is_left_alone(place, done, tmp_path, capsys):
    out, before = done[0], {p: p.stat().st_mtime_ns for p in done[0].rglob("*")}
    for overrides, words in (
        (["mask.ratio=0.5"], "mask.ratio: 0.6 -> 0.5"),
        (["arms.vit.model.depth=2"], "arm vit: "),
        (["budget.steps=13"], "budget.steps: 12 -> 13"),
        (["arms_in_turn=false"], "arms_in_turn: True -> False"),
    ):
        assert main(arguments(place, out, labelled(place), "arms_in_turn=true", *overrides)) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    run = done[0] / "arms" / "vit"  # a folder of another kind
    assert main(arguments(place, run)) == 2
    assert "holds something else" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in done[0].rglob("*")} == before
