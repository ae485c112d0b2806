"""fcmae.analyze end to end: what is planted is found, several subjects in one figure, odd images, mistakes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.analysis import mask_sensitivity
from fcmae.analysis.gallery import masks_of
from fcmae.analysis.images import read_images
from fcmae.analysis.results import SAVING
from fcmae.analysis.subjects import open_subject
from fcmae.analyze import WHATS, main
from fcmae.loss import masked_pixel_loss
from helpers import close
from small_subjects import analysed, make_images, make_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = make_images(tmp_path_factory.mktemp("analysis"))
    make_run(folder / "convnext", "convnext", folder / "all")
    make_run(folder / "vit", "vit", folder / "all")
    return folder


# What only a ViT has; of pairs there is one result.
RESULTS = {"attention-distance": ["vit"], "position-similarity": ["vit"], "cka": ["convnext and vit"]}


@pytest.mark.parametrize("images,used,skipped", [("one", 1, 0), ("mixed", 5, 2)])
def test_every_analysis_on_odd_images(place, tmp_path, capsys, images, used, skipped):
    """One image; grey and coloured ones among broken ones."""
    given = [place / "convnext", place / "vit", "--images", place / images, "--count", 8, "--what", *WHATS]
    assert main([*map(str, given), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    if skipped:
        assert f"{skipped} images skipped, {used} looked at" in said
        assert all(f"skipped, unreadable: {place / images / name}" in said for name in ("torn.png", "empty.jpg"))
    ends = [f"{what}.{end}" for what in WHATS for end in ("png", "json")]
    assert {p.name for p in tmp_path.iterdir()} == {*ends, "tensorboard"}
    for what in WHATS:
        found = json.loads((tmp_path / f"{what}.json").read_text())
        assert found["format"] == "fcmae-analysis-1" and found["what"] == what and found["settings"]["count"] == 8
        assert len(found["images"]["used"]) == used and len(found["images"]["skipped"]) == skipped
        assert list(found["results"]) == RESULTS.get(what, ["convnext", "vit"])
        assert set(found["left_out"]) == ({"convnext"} if RESULTS.get(what) == ["vit"] else set())
        assert all(f"{label} left out" in said for label in found["left_out"])
        [events] = (tmp_path / "tensorboard" / what).iterdir()
        assert events.name.startswith("events.out.tfevents") and events.stat().st_size > 1000
        assert f"look: {tmp_path / what}.png" in said


@pytest.mark.parametrize("what", WHATS)
def test_the_json_has_all_that_the_picture_shows(place, tmp_path, what):
    """Drawn again from the JSON's numbers, the picture is the same; with one of them changed it is another."""
    found = analysed(tmp_path, what, place / "vit", "--count", 5, "--image-size", 64)
    assert same_picture(WHATS[what].draw(found["results"]), tmp_path / f"{what}.png")
    change_one(found["results"])
    assert not same_picture(WHATS[what].draw(found["results"]), tmp_path / f"{what}.png")


def same_picture(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, **SAVING)
    ours, theirs = (np.asarray(Image.open(file).convert("RGB")) for file in (buffer, path))
    return ours.shape == theirs.shape and (ours == theirs).all()


def change_one(found):
    """The first number with a fraction, a third of it; of nested values the first that has one."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found):
        if isinstance(value, (dict, list)) and change_one(value):
            return True
        if (
            isinstance(value, float)
            and value not in (0.0, 1.0)
            and key not in ("mean", "variance_share", "of_neighbours")
        ):
            found[key] = value / 3
            return True
    return False


def test_a_planted_collapsed_layer_and_a_planted_dead_channel_are_found(place, tmp_path):
    """The second MLP of stage 3 gives every channel the same, and overwhelms what came before; of the first block's
    MLP three channels see far less than zero everywhere, and two are on at one level."""

    def plant(model):
        block = model.encoder.stages[2].blocks[1].mlp
        block.fc2.weight[:] = 1e4 * block.fc2.weight[:1]
        block.fc2.bias[:] = 0
        mlp = model.encoder.stages[0].blocks[0].mlp
        mlp.fc1.bias[[3, 5, 8]] = -1e4
        mlp.fc1.weight[[1, 2]] *= 1e-3
        mlp.fc1.bias[[1, 2]] = 2

    make_run(tmp_path / "planted", "convnext", place / "all", plant)
    given = (tmp_path / "planted", place / "convnext", "--labels", "planted", "plain")
    found = analysed(tmp_path / "out", "cosine-distance", *given)["results"]
    layers, plain = ({at["layer"]: at for at in found[name]["layers"]} for name in ("planted", "plain"))
    assert layers["stage 3 block 2"]["distance"] < 0.01 < 0.2 < plain["stage 3 block 2"]["distance"]
    assert layers["stage 3 block 1"]["distance"] > 0.2 and found["planted"]["mean"] < found["plain"]["mean"]
    found = analysed(tmp_path / "out", "activations", *given)["results"]
    first, plain = (found[name]["layers"][0]["widened"] for name in ("planted", "plain"))
    assert first == {"channels": 32, "dead": plain["dead"] + 3, "saturated": plain["saturated"] + 2}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *(f"{what}.{end}" for what in ("activations", "cosine-distance") for end in ("json", "png")), "tensorboard",
    }  # fmt: skip


def test_mask_sensitivity_is_the_models_loss(place, tmp_path):
    given = (place / "convnext", place / "vit", "--image-size", 96, "--count", 6, "--batch-size", 4)
    found = analysed(tmp_path, "mask-sensitivity", *given)["results"]
    for label in ("convnext", "vit"):
        subject = open_subject(str(place / label), label, (96, 96), torch.device("cpu"), 0)
        images = read_images(None, [subject], 6).tensors[label]
        assert found[label]["left_out"] == [0.9] and found[label]["trained_at"] == 0.5
        for point in found[label]["points"]:
            masks = masks_of((3, 3), 6, "random", point["ratio"], 0)
            loss, pred, _ = subject.autoencoder(images, masks)
            assert point["loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert point["hidden"] == masks[0].sum() and point["standard_error"] > 0
        each = mask_sensitivity.losses(subject.autoencoder, images, masks)
        expected = masked_pixel_loss(pred[2:3], images[2:3], masks[2:3], subject.autoencoder.patch_size, True, 32)
        assert each[2] == pytest.approx(expected.item(), rel=1e-5)
    hidden = [masks_of((3, 3), 4, "random", ratio, 0) for ratio in (0.3, 0.6)]
    assert (hidden[0] <= hidden[1]).all()  # masks grow


def test_a_layer_is_most_like_itself(place, tmp_path):
    found = analysed(tmp_path, "cka", place / "convnext", "--count", 10, "--batch-size", 5)["results"]
    [found] = found.values()
    values = torch.tensor(found["values"])
    assert values.shape == (5, 5) and found["examples"] == "10 images"
    close(values.diagonal(), torch.ones(5), 1e-5)
    close(values, values.T, 1e-5)


@pytest.mark.parametrize(
    "given,words",
    [
        (["{convnext}", "--what", "cosine"], ["--what 'cosine'", "did you mean 'cosine-distance'"]),
        (["nowhere", "--what", "cka"], ["no file is called nowhere"]),
        (["convnext_atto", "--what", "cka"], ["timm's model is timm:convnext_atto"]),
        (["timm:convnext_atto@rand", "--what", "cka"], ["random weights: timm:convnext_atto@random"]),
        (["timm:convnextv3", "--what", "cka", "--images", "{all}"], ["no model 'convnextv3'", "did you mean"]),
        (["{convnext}", "--what", "attention-distance"], ["attention-distance", "no ViT"]),
        (["timm:convnext_atto@random", "--what", "mask-sensitivity"], ["no decoder"]),
        (["timm:convnext_atto@random", "--what", "filters"], ["--images"]),
        (["{convnext}", "--what", "filters", "--images", "{broken}"], ["none of the 2 images", "empty.jpg"]),
        (["{convnext}", "--what", "filters", "--images", "nowhere"], ["--images nowhere", "does not exist"]),
        (["{convnext}", "--what", "filters", "--image-size", "50"], ["50", "multiple"]),
        (["{convnext}", "{vit}", "{all}", "--what", "cka"], ["{all}"]),
        (["{convnext}", "{vit}", "{convnext}@random", "--what", "cka"], ["two subjects", "3"]),
        (["{convnext}", "{vit}", "--what", "cka", "--labels", "a"], ["--labels", "2 subjects"]),
        (["{convnext}", "{vit}", "--what", "cka", "--labels", "a", "a"], ["called the same"]),
        (["{convnext}", "--what", "cka", "--count", "0"], ["--count 0"]),
        (["{convnext}", "--what", "cka", "--device", "tpu"], ["device='tpu'"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(place, tmp_path, capsys, given, words):
    names = {name: str(place / name) for name in ("convnext", "vit", "all", "broken")}
    given = [text.format(**names) for text in given]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word.format(**names) in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_nothing_of_others_is_written_over(place, tmp_path, capsys):
    (tmp_path / "filters.png").write_bytes(b"mine")
    given = [str(place / "vit"), "--what", "filters", "--out", str(tmp_path)]
    assert main(given) == 2 and "not written by fcmae.analyze" in capsys.readouterr().err
    (tmp_path / "filters.png").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    for seed in (0, 1):
        assert main([*given, "--seed", str(seed)]) == 0
    assert json.loads((tmp_path / "filters.json").read_text())["settings"]["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "tensorboard" / "filters").iterdir())) == 1


def test_pretrained_weights_without_a_network_are_one_line(place, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fcmae.analyze", "timm:convnextv2_atto", "--what", "filters", "--images",
         str(place / "all"), "--out", str(tmp_path / "out")],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "@random needs none" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_replaced_by_what_can(place, tmp_path):
    (tmp_path / "images").mkdir()
    for i, name in enumerate(("a", "b", "c", "d")):
        data = (place / "all" / f"{i:03d}.png").read_bytes()
        (tmp_path / "images" / f"{name}.png").write_bytes(data[:100] if name in "ac" else data)
    found = analysed(tmp_path / "out", "filters", place / "vit", "--images", tmp_path / "images", "--count", 1)
    assert [Path(name).name for name in found["images"]["used"]] == ["b.png"] and len(found["images"]["skipped"]) == 1


def test_a_network_that_makes_nan_is_one_line(place, tmp_path, capsys):
    def diverge(model):
        model.encoder.stages[2].blocks[1].mlp.fc1.weight[:] = float("nan")

    folder = make_run(tmp_path / "run", "convnext", place / "all", diverge)
    assert main([str(folder), "--what", "cka", "activations", "--out", str(tmp_path / "out")]) == 2
    assert "run: features are NaN or infinite from stage 3 block 2 on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_image_size_that_a_network_does_not_take_is_one_line(place, tmp_path, capsys):
    given = ["timm:mixer_s32_224@random", "--what", "filters", "--images", str(place / "one"), "--image-size", "64"]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot encode images of 64 x 64" in error


def test_events_of_others_stay(place, tmp_path, capsys):
    events = tmp_path / "tensorboard" / "filters" / "events.out.tfevents.mine"
    events.parent.mkdir(parents=True)
    events.write_bytes(b"mine")
    assert main([str(place / "vit"), "--what", "filters", "--out", str(tmp_path)]) == 2
    assert "not written by fcmae.analyze" in capsys.readouterr().err and events.read_bytes() == b"mine"
