"""What a training step sees is a function of (seed, step): not of workers, ranks, resume or broken files."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.data import MaskedImages, SampleStream, make_loader, open_source
from fcmae.data.transforms import IMAGENET_MEAN, IMAGENET_STD, make_transform, stats
from fcmae.errors import UsageError
from fcmae.masking import draw_mask

DRAW = partial(draw_mask, grid=(4, 6), mask_ratio=0.6, strategy="random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(13):
        pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02}.png")
    return root


def make_dataset(folder, seed=0, **options):
    return MaskedImages(open_source(str(folder), 3), make_transform((32, 48), 3, **options), seed, DRAW)


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("image", "mask", "index")) and a["bad"] == b["bad"]


def test_item_depends_on_seed_epoch_and_index_only(folder):
    dataset = make_dataset(folder)
    item = dataset[3, 5]
    torch.rand(7), np.random.rand(7), dataset[0, 1]
    again = make_dataset(folder)[3, 5]
    assert torch.equal(item["image"], again["image"]) and torch.equal(item["mask"], again["mask"])
    assert item["index"] == 5 and item["bad"] == []
    assert item["image"].dtype == torch.float32 and item["mask"].dtype == torch.bool
    assert int((~item["mask"]).sum()) == 9  # int(24 * 0.4)
    for other in (dataset[4, 5], make_dataset(folder, seed=1)[3, 5]):
        assert not torch.equal(item["image"], other["image"]) and not torch.equal(item["mask"], other["mask"])
    assert not torch.equal(item["mask"], dataset[3, 6]["mask"])


def test_items_leave_the_global_generator_alone(folder):
    dataset = make_dataset(folder)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    dataset[0, 0]
    list(make_loader(dataset, SampleStream(13, 0, 4, end_step=1)))
    list(make_loader(dataset, SampleStream(13, 0, 4, end_step=1), workers=1))
    assert torch.equal(torch.rand(3), expected)


def test_mask_does_not_depend_on_the_crop(folder):
    greedy = MaskedImages(open_source(str(folder), 3), lambda image: torch.rand(1000)[:9], 0, DRAW)
    dataset, still = make_dataset(folder), make_dataset(folder, crop_scale=(1, 1), flip=0)
    for key in [(0, 0), (2, 7)]:
        assert torch.equal(greedy[key]["mask"], dataset[key]["mask"])
        assert torch.equal(still[key]["mask"], dataset[key]["mask"])
        assert not torch.equal(still[key]["image"], dataset[key]["image"])


def test_batches_are_the_same_for_any_number_of_workers_and_after_a_resume(folder):
    dataset = make_dataset(folder)
    stream = partial(SampleStream, 13, 0, 4, accum_steps=2, end_step=4)  # 32 samples: two epochs and a half
    expected = list(make_loader(dataset, stream()))
    assert len(expected) == 8 and expected[0]["image"].shape == (4, 3, 32, 48)
    assert expected[0]["mask"].shape == (4, 4, 6) and expected[0]["index"].dtype == torch.int64
    for workers in (1, 2):
        got = list(make_loader(dataset, stream(), workers=workers))
        assert len(got) == 8 and all(map(same, got, expected))
    for start, workers in ((1, 0), (3, 2)):
        got = list(make_loader(dataset, stream(start_step=start), workers=workers))
        assert len(got) == 8 - 2 * start and all(map(same, got, expected[2 * start :]))


def test_spawned_workers_read_the_same_tar(folder, tmp_path):
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", folder, "."], check=True)
    dataset = make_dataset(tmp_path / "a.tar")
    stream = SampleStream(13, 0, 13, end_step=1)
    expected = next(iter(make_loader(dataset, stream)))
    loader = make_loader(dataset, stream, workers=1)
    assert same(next(iter(loader)), expected)  # forked, with the parent's file already open
    loader = make_loader(dataset, stream, workers=1)
    loader.multiprocessing_context = "spawn"
    assert same(next(iter(loader)), expected)


def flat(*streams):
    """The keys of each step, micro-batches in order and the ranks of each side by side."""
    return [key for batches in zip(*streams, strict=True) for batch in batches for key in batch]


@pytest.mark.parametrize(("batch", "accum", "world"), [(2, 3, 2), (1, 3, 4), (4, 1, 3), (3, 4, 1), (6, 2, 1)])
def test_ranks_and_accumulation_share_out_the_single_process_stream(batch, accum, world):
    whole = flat(SampleStream(17, 5, 12, end_step=9))
    ranks = [
        SampleStream(17, 5, batch, accum_steps=accum, rank=rank, world_size=world, end_step=9) for rank in range(world)
    ]
    assert flat(*ranks) == whole
    assert all(len(list(rank)) == len(rank) == 9 * accum for rank in ranks)


def test_each_image_once_an_epoch_and_no_remainder_lost():
    keys = flat(SampleStream(10, 3, 4, end_step=15))  # 60 samples: six epochs of ten, no multiple of four
    assert [epoch for epoch, _ in keys] == [epoch for epoch in range(6) for _ in range(10)]
    orders = [[index for epoch, index in keys if epoch == e] for e in range(6)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert flat(SampleStream(10, 3, 4, start_step=7, end_step=15)) == keys[28:]
    assert flat(SampleStream(10, 4, 4, end_step=15)) != keys
    assert flat(SampleStream(10, 3, 4, start_step=15, end_step=15)) == []


def test_a_batch_larger_than_the_dataset_is_refused():
    SampleStream(24, 0, 4, accum_steps=3, world_size=2, end_step=1)
    with pytest.raises(UsageError, match=r"batch of 24 \(4 per process x 3 .* dataset of 23 images"):
        SampleStream(23, 0, 4, accum_steps=3, world_size=2, end_step=1)


def test_broken_images_are_replaced_named_and_keep_crop_and_mask(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "04.png").write_bytes(b"junk")
    (tmp_path / "09.png").write_bytes((folder / "09.png").read_bytes()[:500])
    dataset, whole = make_dataset(tmp_path), make_dataset(folder)
    stream = SampleStream(13, 0, 13, end_step=2)
    batches = list(make_loader(dataset, stream))
    assert all(map(same, make_loader(dataset, stream, workers=2), batches))
    for batch, good in zip(batches, make_loader(whole, stream), strict=True):
        assert torch.equal(batch["mask"], good["mask"]) and torch.equal(batch["index"], good["index"])
        named = {line.split(":")[0] for line in batch["bad"]}
        assert named == {f"{tmp_path}/04.png", f"{tmp_path}/09.png"}
        kept = ~torch.isin(batch["index"], torch.tensor([4, 9]))
        assert torch.equal(batch["image"][kept], good["image"][kept]) and kept.sum() == 11
    item = dataset[0, 4]
    assert item["index"] == 4 and item["bad"][0].endswith("04.png: not an image that can be read")
    seed = np.random.SeedSequence([0, 0, 4]).spawn(3)[0]
    stand_ins = [dataset._transform(whole.source.load(i), seed) for i in range(13) if i not in (4, 9)]
    assert sum(torch.equal(item["image"], stand_in) for stand_in in stand_ins) == 1
    assert torch.equal(dataset[0, 4]["image"], item["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_of_broken_images_ends_in_one_line(tmp_path, workers):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"junk")
    loader = make_loader(make_dataset(tmp_path), SampleStream(3, 0, 2, end_step=1), workers=workers)
    with pytest.raises(UsageError) as caught:
        next(iter(loader))
    text = str(caught.value)
    assert text.startswith(f"32 images in a row were unreadable, the last: {tmp_path}/") and "\n" not in text


def test_transform_keeps_8_bit_pixels_in_range_and_normalizes():
    pixels = torch.zeros(3, 20, 20, dtype=torch.uint8)
    pixels[:, :, 10:] = 255
    plain = make_transform((64, 64), 3, crop_scale=(1, 1), flip=0, mean=(0, 0, 0), std=(1, 1, 1))
    image = plain(pixels)
    assert image.min() == 0 and image.max() == 1  # bicubic without saturation would overshoot at the edge
    assert plain(pixels / 255).max() > 1.01  # floats have no known range to be held to
    normalized = make_transform((64, 64), 3, crop_scale=(1, 1), flip=0)(pixels)
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    torch.testing.assert_close(normalized, (image - mean) / std)
    flipped = make_transform((64, 64), 3, crop_scale=(1, 1), flip=1)(pixels)
    assert torch.equal(flipped, normalized.flip(2))
    five = make_transform((8, 8), 5)(torch.full((5, 9, 9), 0.75))
    torch.testing.assert_close(five, torch.full((5, 8, 8), 0.5))


def test_stats_and_settings_are_checked():
    assert stats(3) == (IMAGENET_MEAN, IMAGENET_STD)
    assert stats(1) == ((0.5,), (0.5,)) and stats(2, [0, 0.1], None) == ((0.0, 0.1), (0.5, 0.5))
    wrong = ({"mean": (0.5,)}, {"std": (1,) * 4}, {"std": (1, 0, 1)}, {"crop_scale": (0, 1)}, {"flip": 2})
    for options in wrong:
        with pytest.raises(UsageError, match=next(iter(options))):
            make_transform((32, 32), 3, **options)
    with pytest.raises(UsageError, match="seed"):
        MaskedImages([], None, -1, DRAW)


PARENT = """
    import multiprocessing, os, signal, sys, time
    from functools import partial
    import torch.multiprocessing
    from fcmae.data import MaskedImages, SampleStream, make_loader, open_source
    from fcmae.data.transforms import make_transform
    from fcmae.masking import draw_mask

    def slow(image, transform=make_transform((32, 32), 3)):
        time.sleep(0.02)
        return transform(image)

    seen = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: seen.append((number, os.getpid())))
    draw = partial(draw_mask, grid=(1, 2), mask_ratio=0.5, strategy="random")
    dataset = MaskedImages(open_source(sys.argv[1], 3), slow, 0, draw)
    batches = iter(make_loader(dataset, SampleStream(13, 0, 4, end_step=40), workers=2))
    next(batches), next(batches)  # one from each worker: both are up
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""


def start_parent(folder, script):
    code = textwrap.dedent(PARENT) + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", code, folder],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def wait_until_gone(pids):
    """Wait for processes that are not ours to end (zombies have); half a minute means they never will."""

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    for _ in range(600):
        if not any(map(alive, pids)):
            return
        time.sleep(0.05)
    pytest.fail(f"worker processes {pids} are still there")


@pytest.mark.skipif(sys.platform != "linux", reason="workers watch for signals on Linux only")
def test_signals_to_the_whole_group_leave_the_workers_to_the_parent(folder):
    process = start_parent(
        folder,
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            while number not in [n for n, _ in seen]:
                time.sleep(0.01)
        rest = sum(1 for _ in batches)
        assert {pid for _, pid in seen} == {os.getpid()}
        print(rest, flush=True)
        """,
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM):
        os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=50)
    assert process.returncode == 0 and out.split() == ["38"]
    wait_until_gone(workers)


@pytest.mark.skipif(sys.platform != "linux", reason="workers watch for signals on Linux only")
@pytest.mark.parametrize("end", ["killed", "terminate"])
def test_workers_end_with_the_parent_or_by_its_terminate(folder, end):
    script = "time.sleep(60)"
    if end == "terminate":  # what DataLoader does to workers that hang
        script = """
        for worker in multiprocessing.active_children():
            worker.terminate()
            worker.join()
        os._exit(7)
        """
    process = start_parent(folder, script)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    if end == "killed":
        process.kill()
    assert process.wait(timeout=50) == (-signal.SIGKILL if end == "killed" else 7)
    wait_until_gone(workers)
    process.stdout.close()
