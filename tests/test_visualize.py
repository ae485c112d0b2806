"""fcmae.visualize: what is on its pictures, and what its page shows in a browser without a network."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from browser import count_colour, embedded, places, screenshot
from fcmae import pictures
from fcmae.analysis import gallery
from fcmae.analysis.gallery import masks_of, reconstructions, strip
from fcmae.analysis.images import read_images
from fcmae.analysis.subjects import open_subjects
from fcmae.visualize import main
from helpers import close
from small_subjects import make_images, make_run

RATIOS = ("0.3", "0.5", "0.75")
BLUE = "#1f6fb4"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs and their page of 3 ratios and 2 strategies."""
    folder = make_images(tmp_path_factory.mktemp("visualize"))
    make_run(folder / "convnext", "convnext", folder / "all", size=96)
    make_run(folder / "vit", "vit", folder / "all", size=96)
    given = [str(folder / "convnext"), str(folder / "vit"), "--ratios", *RATIOS, "--strategies", "random", "grid"]
    assert main([*given, "--count", "2", "--out", str(folder / "out"), "--device", "cpu"]) == 0
    return folder


def subjects_of(place):
    return open_subjects([str(place / "convnext"), str(place / "vit")], None, None, torch.device("cpu"), 0)


def test_a_sheet_is_what_the_models_make_of_the_masked_images(place):
    subjects = subjects_of(place)
    images = read_images(None, subjects, 2)
    sheet = reconstructions(subjects, images, "random", 0.5, 0)
    assert list(sheet.columns) == ["original", "masked", "convnext", "vit"]
    mask = masks_of((3, 3), 2, "random", 0.5, 0)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(torch.isnan(sheet.columns["masked"]), hidden)
    for subject in subjects:
        model, batch = subject.autoencoder, images.tensors[subject.label]
        _, filled = pictures.reconstruct(model, batch, mask)
        mean, std = (torch.tensor(v)[:, None, None] for v in (subject.mean, subject.std))
        close(sheet.columns[subject.label], (filled * std + mean).clamp(0, 1), 1e-6)
        assert torch.equal(sheet.columns[subject.label][~hidden], sheet.columns["original"][~hidden])
        assert sheet.losses[subject.label] == pytest.approx(model(batch, mask)[0].item(), rel=1e-6)
    assert sheet.label().endswith(pictures.TRUE_STATISTICS)
    shown = np.asarray(strip(sheet))
    assert shown.shape == (2 * 192 + 4, 4 * 192 + 12, 3)  # 96 pixels, each twice as wide
    cell = sheet.columns["vit"][1]
    assert np.array_equal(shown[196::2, 3 * 196 :: 2], (cell * 255).round().byte().permute(1, 2, 0).numpy())


def test_pictures_and_page(place):
    names = {f"{strategy}_{ratio}.png" for strategy in ("random", "grid") for ratio in RATIOS}
    assert {p.name for p in (place / "out").iterdir()} == {*names, "index.html"}
    sizes = {Image.open(place / "out" / name).size for name in names}
    assert len(sizes) == 1
    text = (place / "out" / "index.html").read_text()
    assert len(embedded(place / "out" / "index.html")) == 6
    outside = re.sub(r'src="data:image/png;base64,[^"]+"', "", text)
    assert not re.search(r"https?:|src=|href=|url\(|@import", outside)
    assert "default-src 'none'" in text and text.count(pictures.TRUE_STATISTICS) == 12  # caption and alternative text


@pytest.mark.parametrize("strategy,ratio", [("random", "0.3"), ("grid", "0.75")])
def test_the_page_shows_the_ratio_and_strategy_that_are_set(place, tmp_path, strategy, ratio):
    page = place / "out" / "index.html"
    shot = screenshot(page, tmp_path / "shot.png", f"#ratio={ratio}&strategy={strategy}")
    keys = [(s, r) for s in ("random", "grid") for r in RATIOS]
    seen = {key: places(shot, picture) for key, picture in zip(keys, embedded(page), strict=True)}
    assert [key for key, found in seen.items() if found] == [(strategy, ratio)], seen
    [(top, left)] = seen[strategy, ratio]
    # The slider's filled part ends where the ratio is, and one of two buttons is pressed, above the picture.
    controls = shot[:top]
    blue = (controls == [int(BLUE[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
    track = blue[:, left : left + 400].any(0).sum()  # 16 rem wide
    assert (track > 220) == (ratio == "0.75")
    assert count_colour(controls, BLUE) > 1000
    columns = np.flatnonzero(blue[:, left + 400 :].any(0))
    pressed = "random" if columns.min() < 80 else "grid"
    assert pressed == strategy


def test_without_a_fragment_it_shows_the_middle(place, tmp_path):
    page = place / "out" / "index.html"
    shot = screenshot(page, tmp_path / "shot.png")
    assert [bool(places(shot, picture)) for picture in embedded(page)] == [False, True, False, False, False, False]


def test_odd_images_and_runs_of_other_masks(place, tmp_path, capsys):
    given = [str(place / "convnext"), "--images", str(place / "mixed"), "--out", str(tmp_path / "out")]
    assert main([*given, "--ratios", "0.5", "0.95", "--strategies", "block"]) == 0
    said = capsys.readouterr().out
    assert "skipped, unreadable" in said and "block 0.95 left out" in said and "block 0.5: loss convnext" in said
    text = (tmp_path / "out" / "index.html").read_text()
    assert "0.95 left out" in text and "torn.png" in text
    assert main([*given, "--ratios", "0.6", "--images", str(place / "one")]) == 0  # its own page is written over
    assert (tmp_path / "out" / "random_0.6.png").is_file()


@pytest.mark.parametrize(
    "given,words",
    [
        (["{convnext}", "--ratios", "1.5"], ["--ratios 1.5"]),
        (["{convnext}", "--ratios", "0.99"], ["none of the --ratios"]),
        (["{convnext}", "--strategies", "blocks"], ["--strategies blocks", "'block'"]),
        (["{convnext}", "--count", "0"], ["--count"]),
        (["{convnext}", "--images", "{broken}"], ["none of the 2 images"]),
        (["nowhere"], ["nowhere"]),
        (["timm:convnext_atto@random", "--images", "{one}"], ["no decoder"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(place, tmp_path, capsys, given, words):
    given = [text.format(**{name: place / name for name in ("convnext", "broken", "one")}) for text in given]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_interrupted_it_can_be_repeated_and_old_pictures_go(place, tmp_path, monkeypatch):
    given = [str(place / "convnext"), "--count", "1", "--strategies", "random", "--out", str(tmp_path / "out")]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gallery, "write_sheet", interrupted)
        main([*given, "--ratios", "0.3", "0.6"])
    assert main([*given, "--ratios", "0.3", "0.6"]) == 0
    (tmp_path / "out" / "mine.png").write_bytes(b"mine")
    assert main([*given, "--ratios", "0.5"]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"index.html", "mine.png", "random_0.5.png"}


def test_runs_of_other_sizes_have_masks_of_their_own_and_names_are_not_taken(place, tmp_path, capsys):
    small = make_run(tmp_path / "small", "convnext", place / "all", size=64)
    subjects = open_subjects([str(place / "convnext"), str(small)], None, None, torch.device("cpu"), 0)
    sheet = reconstructions(subjects, read_images(None, subjects, 2), "random", 0.5, 0)
    shapes = [list(x.shape[2:]) for x in sheet.columns.values()]
    assert list(sheet.columns)[1::2] == ["masked, 32 px of 96 x 96", "masked, 32 px of 64 x 64"]
    assert shapes == [[96, 96], [96, 96], [96, 96], [64, 64], [64, 64]]
    assert main([str(small), "--labels", "masked", "--out", str(tmp_path / "out")]) == 2
    assert "a run cannot be called masked" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_page_of_something_else_stays(place, tmp_path, capsys):
    (tmp_path / "index.html").write_text("mine")
    assert main([str(place / "convnext"), "--out", str(tmp_path)]) == 2
    assert "not written by fcmae.visualize" in capsys.readouterr().err
    assert (tmp_path / "index.html").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
