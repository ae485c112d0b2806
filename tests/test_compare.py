"""Comparing arms: the same data for all, resuming, the figures of the report recomputed, the page, bad input."""

import html
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fcmae import config as settings
from fcmae.compare import main
from fcmae.comparison import channels, measure, report
from fcmae.comparison.settings import CompareConfig, arms_of
from fcmae.downstream import representation
from fcmae.downstream.labelled import CentreCrops, open_labelled
from fcmae.models.autoencoder import MaskedAutoencoder
from fcmae.pretrain import build_dataset, build_model
from fcmae.pretrain import main as pretrain
from fcmae.train.schedule import make_schedule
from fcmae.weights import read_checkpoint
from helpers import close
from small_runs import assert_same_run, environment, final_state, make_pictures, metrics

CONFIGS = Path(__file__).parent.parent / "configs"
CONFIG = """
arms:
  convnext:
    model: {name: fcmae_convnextv2_atto, depths: [1, 1, 2, 1], dims: [8, 12, 16, 24], decoder_dim: 16}
  vit:
    model: {name: mae_vit_tiny_patch16, dim: 32, depth: 3, heads: 2, decoder_dim: 32, decoder_depth: 1,
            decoder_heads: 2}
model: {image_size: [64, 96]}
budget: {steps: 12}
train: {batch_size: 8, warmup_epochs: 0.5, lr: 1.0e-3}
checkpoint: {every: 4}
data: {workers: 0}
evaluate: {images: 3, distance_images: 10, batch_size: 7, neighbours: 3}
log: {tensorboard: false, images: 0, print_every: 1}
device: cpu
"""
ARMS = ("convnext", "vit")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums in the order in which the runs in processes of their own have them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures in a class folder for each photograph they are cut from, and a config."""
    folder = tmp_path_factory.mktemp("compare")
    for i, path in enumerate(sorted(make_pictures(folder / "all", 40).iterdir())):
        home = folder / "pictures" / f"photo{i % 4}"
        home.mkdir(parents=True, exist_ok=True)
        path.rename(home / path.name)
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def arguments(place, out, *overrides) -> list[str]:
    return [str(place / "config.yaml"), f"data.source={place / 'pictures'}", f"out={out}", *overrides]


def labelled(place) -> str:
    return f"data.labelled={place / 'pictures'}"


def configured(place, *overrides) -> CompareConfig:
    return settings.load(CompareConfig, place / "config.yaml", arguments(place, "x", *overrides)[1:])


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


@pytest.mark.slow
@pytest.mark.parametrize("turns", ["true", "false"])
def test_killed_and_continued_the_arms_are_the_same(place, done, tmp_path, turns):
    out, settings_ = tmp_path / "killed", [labelled(place), f"arms_in_turn={turns}", "checkpoint.every=2"]
    command = [sys.executable, "-m", "fcmae.compare", *arguments(place, out, *settings_)]
    for goal in (5, 9):  # lines of the arm that is further behind in the first case, then of any
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


def test_averages_thinning_and_a_loss_that_is_not_reached():
    curve = {"step": list(range(1, 501)), "loss": [500.0 - i for i in range(500)]}
    curve |= {"seconds": [i / 2 for i in curve["step"]], "smooth": measure.running_mean(curve["loss"], 10)}
    assert measure.window(500) == 10 and measure.window(3) == 1
    assert curve["smooth"][0] == 500 and curve["smooth"][-1] == pytest.approx(5.5)
    assert curve["smooth"][99] == pytest.approx(np.mean(curve["loss"][90:100]))
    assert measure.time_to(curve, 5.5) == {"step": 500, "seconds": 250.0}
    assert measure.time_to(curve, 5.4) is None
    thin = measure.thinned(curve, most=100)
    assert len(thin["step"]) == 100 and thin["step"][-1] == 500 and set(np.diff(thin["step"])) == {5}
    assert thin["loss"] == [curve["loss"][s - 1] for s in thin["step"]]


def test_flops_by_hand(place):
    """The ConvNet's on visible regions are the dense network's times their share; the ViT's are summed here."""
    arms = arms_of(configured(place, "mask.ratio=0.5"))
    counted = {name: measure.flops(arm) for name, arm in arms.items()}
    assert counted["convnext"]["encoder"] * 6 == counted["convnext"]["encoder_dense"] * 3

    def block(tokens, dim):
        return 2 * tokens * dim * (3 + 1 + 8) * dim + 2 * 2 * tokens**2 * dim  # qkv, output, MLP; q k^T and its use

    visible, every = 3 * 4, 6 * 4
    encoder = 2 * visible * 768 * 32 + 3 * block(1 + visible, 32)
    decoder = 2 * (1 + visible) * 32 * 32 + block(1 + every, 32) + 2 * every * 32 * 768
    assert counted["vit"] == {
        "encoder": encoder,
        "whole": encoder + decoder,
        "encoder_dense": 2 * every * 768 * 32 + 3 * block(1 + every, 32),
    }


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


def test_knn_against_a_direct_computation():
    rng = np.random.default_rng(0)
    train, val, labels = rng.normal(size=(60, 5)), rng.normal(size=(30, 5)), rng.integers(0, 4, 60)
    expected = []
    for x in val:
        cosines = [float(x @ t / math.sqrt(x @ x) / math.sqrt(t @ t)) for t in train]
        votes = [0.0] * 4
        for i in sorted(range(60), key=lambda i: -cosines[i])[:7]:  # noqa: B023
            votes[labels[i]] += math.exp(cosines[i] / 0.07)
        expected.append(votes.index(max(votes)))
    tensors = [torch.from_numpy(x) for x in (train, labels, val)]
    assert representation.knn(*tensors, 4, 7, 0.07).tolist() == expected
    assert len(set(expected)) == 4
    assert representation.knn(*tensors, 4, 600, 0.07).shape == (30,)  # no more neighbours than images


def test_the_probe_is_the_minimum_and_the_same_every_time():
    """Its gradient vanishes, seen from outside: moving a decision by any class's bias makes the loss no better."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 6, generator=generator)
    labels = torch.arange(90) % 3
    train = centres[labels] + 0.3 * torch.randn(90, 6, generator=generator)
    val = centres[labels] + 0.3 * torch.randn(90, 6, generator=generator)
    scaled = train * torch.tensor([1e3, 1, 1e-3, 1, 1, 1]) + 7  # features are standardized
    found = representation.probe(train, labels, val, 3, 1e-3)
    assert (found == labels).double().mean() > 0.95
    assert torch.equal(found, representation.probe(train, labels, val, 3, 1e-3))
    moved = val * torch.tensor([1e3, 1, 1e-3, 1, 1, 1]) + 7
    assert torch.equal(found, representation.probe(scaled, labels, moved, 3, 1e-3))
    shuffled = labels[torch.randperm(90, generator=generator)]
    assert (representation.probe(train, shuffled, val, 3, 1e-3) == labels).double().mean() < 0.7


def test_accuracy_and_its_error():
    found = representation.accuracy(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 0, 1]))
    assert found == {"top1": 0.5, "standard_error": 0.25, "balanced": pytest.approx((2 / 3 + 0) / 2)}


def test_cosine_distance_against_a_double_loop():
    x = torch.randn(3, 10, 6, dtype=torch.float64)
    x[1, :, 2] = 0
    for image, found in zip(x, channels.cosine_distance(x), strict=True):
        total = 0.0
        for i in range(6):
            for j in range(6):
                a, b = image[:, i], image[:, j]
                length = (a.norm() * b.norm()).item()
                total += (1 - (a @ b).item() / length if length else 1.0) / 2
        assert found.item() == pytest.approx(total / 36)


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
            predicted = representation.knn(torch.stack(x), labels[0], torch.stack(y), 4, 3, 0.07)
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
            close(torch.tensor(layers[0]["distance"]), channels.cosine_distance(maps).mean(), 1e-6)
            assert [layer["layer"] for layer in layers] == (
                ["stage 1 block 1", "stage 2 block 1", "stage 3 block 1", "stage 3 block 2", "stage 4 block 1"]
                if name == "convnext"
                else ["block 1", "block 2", "block 3"]
            )
            mean = statistics.fmean(layer["distance"] for layer in layers)
            assert reported["cosine_distance"]["mean"] == pytest.approx(mean)


def test_the_split_of_labelled_images(place, tmp_path):
    root = str(place / "pictures")
    found = open_labelled(root, 3, 0, 0.2, 50_000)
    assert found.classes == ["photo0", "photo1", "photo2", "photo3"]
    assert [label for _, label in found.val] == [0, 0, 1, 1, 2, 2, 3, 3]
    train, val = {p for p, _ in found.train}, {p for p, _ in found.val}
    assert len(train) == 32 and not train & val
    assert open_labelled(root, 3, 0, 0.2, 50_000) == found != open_labelled(root, 3, 1, 0.2, 50_000)
    assert len(open_labelled(root, 3, 0, 0.2, 5).train) == 5
    for part, source in (("train", "photo0"), ("train", "photo1"), ("val", "photo1")):
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / source).symlink_to(place / "pictures" / source)
    split = open_labelled(str(tmp_path), 3, 0, 0.2, 50_000)
    assert (len(split.train), len(split.val), split.classes) == (20, 10, ["photo0", "photo1"])
    assert {label for _, label in split.val} == {1}


def test_a_centre_crop_is_the_centre(tmp_path):
    """A gradient across: the crop of the middle 7/8 has the ends of the middle 7/8."""
    crops = CentreCrops([], (64, 64), 3, [0.0] * 3, [1.0] * 3)
    ramp = torch.linspace(0, 1, 256).expand(3, 128, 256)
    crop = crops.crop(ramp)
    assert crop.shape == (3, 64, 64)
    width = 64 / (256 * 64 / 128 * 256 / 224)  # of the scaled image
    assert crop[0, :, 0].mean() == pytest.approx(0.5 - width / 2, abs=0.01)
    assert crop[0, :, -1].mean() == pytest.approx(0.5 + width / 2, abs=0.01)


def test_the_page_has_every_figure_and_needs_no_network(done):
    out, _, found = done
    page = (out / "report.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    rows = dict(report.table(found))
    assert len(rows) == 21
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
        config = settings.load(settings.Config, arm / "config.yaml", [])
        schedule = make_schedule(config.train, 40, 1)
        rates = [row["lr"] for row in metrics(arm)]
        assert rates == [schedule.lr_at(0, used) for used in [0.0, *own["seconds"][:-1]]]
        assert rates[0] == 0 and max(rates) == pytest.approx(1e-3, rel=0.3) and rates[-1] < 0.3e-3
    resumed, before = out / "arms" / "vit", curve_of(out, "vit")
    (resumed / "encoder.safetensors").unlink()
    for path in sorted((resumed / "checkpoints").iterdir())[1:]:
        path.unlink()
    assert main([*given, "--arms-in-turn"]) == 0
    after = curve_of(out, "vit")
    assert after["seconds"][:4] == before["seconds"][:4] and after["seconds"] != before["seconds"]
    assert after["seconds"][-2] < seconds <= after["seconds"][-1]
    assert after["step"] == list(range(1, len(after["step"]) + 1))


@pytest.mark.parametrize(
    "overrides,words",
    [
        (["arms={convnext: {train: {lr: 1e-3}}}"], None),  # merged into the two that there are
        (["budget.steps=null"], ["no budget", "budget.steps and budget.seconds"]),
        (["budget.seconds=5"], ["both budget.steps=12 and budget.seconds=5"]),
        (["budget.steps=0"], ["budget.steps=0", "1 or more"]),
        (["arms.vit.modle.name=x"], ["arms.vit.modle.name=x", "unknown setting", "model.name"]),
        (["arms.vit=3"], ["arms.vit takes settings"]),
        (["arms.vit.train.lr=fast"], ["arms.vit", "train.lr takes float"]),
        (["arms.vit.data.source=elsewhere"], ["arms.vit.data.source", "the same for all arms"]),
        (["arms.vit.mask.ratio=0.5"], ["arms.vit.mask.ratio", "the same for all arms"]),
        (["arms.vit.loss.norm_window=16"], ["arms.vit.loss.norm_window", "the same for all arms"]),
        (["arms.vit.seed=1"], ["arms.vit.seed", "the same for all arms"]),
        (["arms.vit.model.image_size=32"], ["arms.vit.model.image_size", "the same for all arms"]),
        (["arms.vit.train.steps=5"], ["arms.vit.train.steps", "the budget says how long"]),
        (["train.steps=5"], ["train.steps=5", "the budget says how long"]),
        (["arms.vit.out=x"], ["arms.vit.out", "out/arms/NAME"]),
        (["arms.vit.train.batch_size=4"], ["train.effective_batch", "8 of convnext, 4 of vit"]),
        (["mask.ratio=null"], ["mask.ratio", "0.6 of convnext, 0.75 of vit"]),
        (["loss.norm_window=null"], ["loss.norm_window", "32 of convnext, 16 of vit"]),
        (["mask.unit=16"], ["arm convnext", "mask.unit=16"]),
        (["arms.vit.model.heads=5"], ["arm vit", "heads=5"]),
        (["arms.vit.model.name=mae_vit_tinny"], ["arm vit", "unknown model", "mae_vit_tiny_patch16"]),
        (["arms.vit.init=nowhere.pt"], ["arm vit", "nowhere.pt"]),
        (["arms.a/b.seed=1"], ["arms.a/b", "folder"]),
        (["data.source=nowhere"], ["data.source=nowhere", "does not exist"]),
        (["data.labelled=nowhere"], ["data.labelled=nowhere", "no folder"]),
        (["data.labelled={place}/pictures/photo0"], ["data.labelled=", "no folder with images in it"]),
        (["data.labelled={place}/one"], ["data.labelled=", "only the class photo0"]),
        (["evaluate.neighbours=0"], ["evaluate.neighbours=0", "1 or more"]),
        (["train.warmup_epochs=9"], ["arm convnext", "train.warmup_epochs=9"]),
        (["out=null"], ["out=null", "folder of the comparison"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(place, tmp_path, capsys, overrides, words):
    if not (place / "one").exists():
        (place / "one").mkdir()
        (place / "one" / "photo0").symlink_to(place / "pictures" / "photo0")
    if words is None:
        assert arms_of(configured(place, *overrides))["convnext"].train.lr == 1e-3
        return
    overrides = [o.replace("{place}", str(place)) for o in overrides]
    assert main(arguments(place, tmp_path / "out", *overrides)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arms", ["arms: {}", "arms: {vit: {model: {name: mae_vit_tiny_patch16}}}"])
def test_fewer_than_two_arms(place, tmp_path, capsys, arms):
    (tmp_path / "few.yaml").write_text(f"{arms}\nbudget: {{steps: 3}}\n")
    given = [str(tmp_path / "few.yaml"), f"data.source={place / 'pictures'}", f"out={tmp_path / 'out'}"]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "give two or more" in error
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("name", ["laptop", "published_base", "published_large"])
def test_shipped_comparisons(name):
    path = CONFIGS / "compare" / f"{name}.yaml"
    config = settings.load(CompareConfig, path, ["data.source=x"])
    arms = arms_of(config)
    assert list(arms) == ["convnext", "vit"]
    assert all((a.mask.unit, a.mask.ratio, a.loss.norm_window) == (32, 0.6, 32) for a in arms.values())
    head = path.read_text().split("\n\n")[0]
    for word in ("Compares:", "Command:", "Cost:", "Expected:"):
        assert word in head
    if name == "laptop":
        return
    for arm in arms.values():
        schedule = make_schedule(arm.train, 1_281_167, world_size=8)
        recipe = settings.load(settings.Config, CONFIGS / "pretrain" / f"{arm.model.name}.yaml", [])
        own = make_schedule(recipe.train, 1_281_167, world_size=8)
        assert (schedule.steps, schedule.effective_batch, schedule.peak_lr) == (
            own.steps, own.effective_batch, own.peak_lr,
        )  # fmt: skip
        assert (schedule.warmup_epochs, schedule.epochs) == (own.warmup_epochs, pytest.approx(own.epochs, rel=1e-5))
        same = ("batch_size", "weight_decay", "betas", "precision", "clip_grad")
        assert [getattr(arm.train, key) for key in same] == [getattr(recipe.train, key) for key in same]
        assert arm.model.image_size == recipe.model.image_size and arm.data.crop_scale == recipe.data.crop_scale
