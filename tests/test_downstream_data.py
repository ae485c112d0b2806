"""Labelled images: folders, lists, shares of them; and what validation counts."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.data import LabelledImages, SampleStream, make_loader
from fcmae.downstream.augment import objective, training_transform
from fcmae.downstream.data import as_source, open_parts, open_val
from fcmae.downstream.evaluation import Tally
from fcmae.downstream.labelled import CentreCrops
from fcmae.downstream.settings import FinetuneConfig
from fcmae.errors import UsageError
from shapes import CLASSES, make_shapes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data"), train=30, val=5)


def opened(place, fraction=1.0, seed=0, train=None):
    return open_parts(str(train or place / "train"), str(place / "val"), 3, fraction, seed)


def counts(files) -> list[int]:
    return np.bincount([label for _, label in files], minlength=4).tolist()


def test_folders(place):
    found = opened(place)
    assert found.classes == sorted(CLASSES)
    assert counts(found.train) == [30, 30, 30, 28] and counts(found.val) == [5, 5, 5, 3]
    assert all(f"/train/{found.classes[label]}/" in path for path, label in found.train)


@pytest.mark.parametrize("fraction,expected", [(0.1, [3, 3, 3, 3]), (0.5, [15, 15, 15, 14]), (0.01, [1, 1, 1, 1])])
def test_a_fraction_is_stratified_and_seeded(place, fraction, expected):
    found = opened(place, fraction)
    assert counts(found.train) == expected and found.val == opened(place).val
    assert found == opened(place, fraction) and set(found.train) < set(opened(place).train)
    assert found.train != opened(place, fraction, seed=1).train
    assert f"{fraction:g} of every class" in found.split


def test_lists_say_what_folders_say(place, tmp_path):
    found = opened(place)
    rows = ["path,label", *(f"{path},{found.classes[label]}" for path, label in found.train)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    assert opened(place, train=tmp_path / "train.csv") == found
    (tmp_path / "bare.csv").write_text("\n".join(rows[1:]))
    with pytest.raises(UsageError, match="must name the columns"):
        opened(place, train=tmp_path / "bare.csv")
    (tmp_path / "hole.csv").write_text(f"path,label\n{found.train[0][0]},\n")
    with pytest.raises(UsageError, match="has no label"):
        opened(place, train=tmp_path / "hole.csv")


def test_classes_to_validate_may_be_named(place):
    names = [*CLASSES, "zebra"]
    assert counts(open_val(str(place / "val"), 3, names, 5, "it").val) == [5, 5, 5, 3]
    with pytest.raises(UsageError, match="tells 5 classes and data.val=.* has 4"):
        open_val(str(place / "val"), 3, None, 5, "it")
    with pytest.raises(UsageError, match="has the class bars, which it does not know"):
        open_val(str(place / "val"), 3, ["disc", "frame", "wedge"], 3, "it")


def dataset(place, **data) -> LabelledImages:
    config = FinetuneConfig()
    config.model.image_size = 32
    for key, value in data.items():
        setattr(config.data, key, value)
    return LabelledImages(*as_source(opened(place).train, 3), training_transform(config), 0)


STRONG = {"randaugment": "rand-m10-mstd3-inc1", "random_erasing": 0.9}


def test_augmentation_follows_from_seed_epoch_and_index(place):
    made, calm = dataset(place, **STRONG), dataset(place)
    stream = SampleStream(118, 0, 59, end_step=2)
    batches = list(make_loader(made, stream))
    torch.manual_seed(5)
    np.random.seed(5)
    for again, batch in zip(make_loader(made, stream, workers=2), batches, strict=True):
        assert torch.equal(again["image"], batch["image"]) and torch.equal(again["label"], batch["label"])
    first, other = made[0, 7]["image"], made[1, 7]["image"]
    assert not torch.equal(first, other) and not torch.equal(first, calm[0, 7]["image"])
    assert batches[0]["image"].dtype == torch.float32 and batches[0]["label"].tolist() == [
        int(made.labels[i]) for i in batches[0]["index"]
    ]


def test_the_global_generators_are_left_alone(place):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    dataset(place, **STRONG)[0, 3]
    after = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert after == (torch.rand(1).item(), np.random.rand(), random.random())


def test_every_strength_of_randaugment_runs(place):
    """Pillow 13 refuses the 0 bits that timm's strongest posterize keeps."""
    made = dataset(place, randaugment="rand-m10-n8-mstd0.5-inc1-p1")
    assert all(torch.isfinite(made[e, i]["image"]).all() for e in range(3) for i in range(40))


def test_a_replaced_image_brings_its_own_label(tmp_path):
    for kind, colour in (("a", 0), ("b", 255)):
        (tmp_path / kind).mkdir()
        for i in range(4):
            Image.new("L", (40, 40), colour).save(tmp_path / kind / f"{i}.png")
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"nothing")
    found = open_parts(str(tmp_path), str(tmp_path), 3, 1.0, 0)
    config = FinetuneConfig()
    config.model.image_size = 32
    made = LabelledImages(*as_source(found.train, 3), training_transform(config), 0)
    items = [made[e, i] for e in range(4) for i in range(8)]
    assert sum(bool(item["bad"]) for item in items) == 12
    assert all((item["image"].mean() > 0) == (item["label"] == 1) for item in items)
    assert any(item["label"] == 1 and item["index"] < 4 for item in items)


def test_centre_crops():
    image = torch.arange(60, dtype=torch.uint8).repeat(3, 40, 1)  # (3, 40, 60), columns 0 ... 59
    crops = {
        name: CentreCrops([], (40, 40), 3, [0.0] * 3, [1.0] * 3, *given).crop(image) * 255
        for name, given in {"whole": (1.0,), "squash": (0.5, True), "half": (0.5,)}.items()
    }
    torch.testing.assert_close(crops["whole"][0, 0], torch.arange(10.0, 50.0))
    assert crops["squash"][0, 0, 0] < 2 and crops["squash"][0, 0, -1] > 57
    assert 19 <= crops["half"][0, 0, 0] <= 21 and 38 <= crops["half"][0, 0, -1] <= 40


def test_scores_against_direct_counts():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 7), torch.randint(0, 6, (200,))  # no image of the last class
    tally = Tally.empty(7)
    for a, b in zip(logits.split(33), labels.split(33), strict=True):
        tally.add(a, b)
    found, predicted = tally.scores(), logits.argmax(1).tolist()
    pairs = list(zip(labels.tolist(), predicted, strict=True))
    assert found["top1"] == sum(a == b for a, b in pairs) / 200
    each = [sum(a == b == c for a, b in pairs) / sum(a == c for a, _ in pairs) for c in range(6)]
    assert found["balanced"] == pytest.approx(sum(each) / 6) and tally.per_class() == [*each, None]
    five = sum(label in row.sort(descending=True).indices[:5] for row, label in zip(logits, labels, strict=True))
    assert found["top5"] == five / 200
    assert all(tally.table[a, b] == pairs.count((a, b)) for a in range(7) for b in range(7))
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits.double(), labels).item())


def test_very_many_classes_keep_no_pairs():
    tally = Tally.empty(21841)
    tally.add(torch.nn.functional.one_hot(torch.tensor([5, 9]), 21841).float(), torch.tensor([5, 21840]))
    assert tally.table is None and tally.scores()["top1"] == 0.5 and tally.scores()["balanced"] == 0.5


def test_8_bits_do_not_wrap_around_under_randaugment():
    """A bicubic crop of a float image overshoots at an edge."""
    image = torch.zeros(3, 40, 40)
    image[:, :, 20:] = 1
    settings = FinetuneConfig()
    settings.model.image_size, settings.data.crop_scale, settings.data.flip = 64, [1.0, 1.0], 0.0
    settings.data.mean, settings.data.std = [0.0] * 3, [1.0] * 3
    settings.data.randaugment = "rand-m0-n0"
    made = training_transform(settings)(image)
    assert made[:, :, :24].max() < 0.2 and made[:, :, 40:].min() > 0.8


@pytest.mark.parametrize("kind", ["smoothed", "mixup", "cutmix"])
def test_the_loss_by_hand(kind):
    """Each image is of one value, so that what is mixed tells its share; the logits are fixed."""
    settings, classes, smoothing = FinetuneConfig(), 5, 0.2
    settings.train.label_smoothing = smoothing
    settings.data.mixup, settings.data.cutmix = 0.8 * (kind == "mixup"), 1.0 * (kind == "cutmix")
    labels, logits = torch.tensor([0, 3, 4, 1]), torch.randn(4, classes, generator=torch.Generator().manual_seed(0))
    values, seen = torch.tensor([1.0, 2.0, 4.0, 8.0]), []
    np.random.seed(3)

    def forward(images):
        seen.append(images.clone())
        return logits

    found = objective(settings, classes)(forward, values[:, None, None, None].expand(4, 3, 16, 16).clone(), labels)
    means = seen[0].mean((1, 2, 3))
    share = ((means - values.flip(0)) / (values - values.flip(0)))[:, None]  # of the image itself
    assert kind == "smoothed" or 0 < share[0] < 1
    own, other = (torch.full((4, classes), smoothing / classes) for _ in range(2))
    for target, of in ((own, labels), (other, labels.flip(0))):
        target[range(4), of] += 1 - smoothing
    target = own if kind == "smoothed" else share * own + (1 - share) * other
    assert found.item() == pytest.approx(-(target * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
