"""Long runs and large collections: what a process holds does not grow, and listing is bounded in time and memory."""

from __future__ import annotations

import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

from small_runs import CONFIG, environment, make_pictures
from soak.crashes import check_whole
from soak.processes import children

pytestmark = pytest.mark.soak

# Growth of resident memory allowed, in MiB of each process, from the least of the steps after the first tenth to the
# least of the last four tenths: matplotlib leaves some 20 MiB of figures until Python collects cycles. Found are 3 KiB
# kept at every step, or 500 KiB at every checkpoint. File handles and threads may not grow at all.
GROWTH = 24
MEASURES = (min, statistics.median, statistics.median)  # of memory, file handles, threads
SETTINGS = ["train.batch_size=2", "data.workers=2", "log.images=2", "log.tensorboard=true", "log.print_every=500",
            "train.lr=1.0e-4"]  # fmt: skip


def test_a_long_run_does_not_grow(tmp_path, often, figures):
    steps, out = often(20_000, 300), tmp_path / "out"
    every, epoch = steps // 100, 40 // 2
    own = [f"train.steps={steps}", f"checkpoint.every={every}", f"log.collapse_every={every}",
           f"log.images_every={steps / 20 / epoch}"]  # fmt: skip
    (tmp_path / "config.yaml").write_text(CONFIG)
    source = make_pictures(tmp_path / "pictures")
    command = [sys.executable, "-m", "fcmae.pretrain", str(tmp_path / "config.yaml"), f"data.source={source}"]
    with open(tmp_path / "said", "wb") as said:
        run = subprocess.Popen([*command, f"out={out}", *own, *SETTINGS], env=environment(), stdout=said, stderr=said)
    rows = defaultdict(list)  # of each process: (step, resident MiB, file handles, threads)
    while run.poll() is None:
        step = newest_step(out / "metrics.jsonl")
        if 0 < step < steps - 2:
            workers = children(run.pid)
            for name, pid in [("main", run.pid), *((f"worker {i}", pid) for i, pid in enumerate(sorted(workers)))]:
                if (found := held(pid)) is not None:
                    rows[name].append((step, *found))
        time.sleep(steps / 100_000)
    assert run.returncode == 0, (tmp_path / "said").read_text()[-2000:]
    check_whole(out)
    assert newest_step(out / "metrics.jsonl") == steps and list(rows) == ["main", "worker 0", "worker 1"]
    counted = {"steps": steps, "pictures": len(list((out / "reconstructions").iterdir()))}
    for name, samples in rows.items():
        begin = [row[1:] for row in samples if 0.1 * steps <= row[0] < 0.5 * steps]
        end = [row[1:] for row in samples if row[0] >= 0.6 * steps]
        assert len(begin) > 5 and len(end) > 5, f"{name}: {len(samples)} samples"
        before, after = measured(begin), measured(end)
        key = name.replace(" ", "_")
        counted[f"{key}_mib"] = f"{before[0]:.1f} to {after[0]:.1f}"
        counted[f"{key}_handles"], counted[f"{key}_threads"] = f"{before[1]:g} to {after[1]:g}", f"{after[2]:g}"
        growth = often(GROWTH, 3 * GROWTH)  # what a few hundred steps begin with
        assert after[0] - before[0] <= growth, f"{name} grew from {before[0]} to {after[0]} MiB"
        assert after[1] <= before[1] and after[2] <= before[2], f"{name}: handles, threads {before[1:]} to {after[1:]}"
    figures("endurance", **counted)


def measured(samples: list[tuple]) -> list[float]:
    """Memory, file handles and threads of a part of the run."""
    return [measure(values) for measure, values in zip(MEASURES, zip(*samples, strict=True), strict=True)]


def newest_step(path: Path) -> int:
    """Of the last whole line of metrics.jsonl, without reading all of it."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = [line for line in file.read().splitlines(keepends=True)[-3:] if line.endswith(b"\n")]
    return json.loads(lines[-1])["step"] if lines else 0


def held(pid: int) -> tuple[float, int, int] | None:
    """Resident MiB, file handles and threads of a process; None of one that ends just now."""
    try:
        rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(rows["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(rows["Threads"])
    except (OSError, KeyError):
        return None


OPEN = """
import json, resource, sys, time
from fcmae.data import open_source
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, began = peak(), time.monotonic()
source = open_source(sys.argv[1], 3)
took, after = time.monotonic() - began, peak()
print(json.dumps({"count": len(source), "seconds": round(took, 2), "mib": round(after - before, 1),
                  "first": source.name(0), "last": source.name(len(source) - 1)}))
"""


def opened(source: Path) -> dict:
    """How many images a fresh process finds, in what time, and by how much its largest resident size grew."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(source)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_folder_of_a_million_files(tmp_path, often, figures):
    """In one folder, which is the worst case."""
    count = often(1_000_000, 20_000)
    folder = tmp_path / "images"
    folder.mkdir()
    try:
        for number in range(count):
            path = folder / f"image_{number:07d}.jpg"
            if number % 50_000 == 0:  # links to few files: as many names, but not as many inodes of the disk
                first = path
                first.touch()
            else:
                os.link(first, path)
        found = opened(folder)
    finally:
        shutil.rmtree(folder)
    assert (found["count"], Path(found["first"]).name) == (count, "image_0000000.jpg")
    assert Path(found["last"]).name == f"image_{count - 1:07d}.jpg"
    assert found["seconds"] < 300 and found["mib"] < 2048, found
    figures("million_files", files=count, seconds=found["seconds"], peak_mib=found["mib"])


def test_a_tar_of_ten_thousand_members(tmp_path, often, figures):
    count, path = often(10_000, 1_000), tmp_path / "images.tar"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 60)).save(buffer, "jpeg")
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            member = tarfile.TarInfo(f"image_{number:05d}.jpg")
            member.size = buffer.getbuffer().nbytes
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    first, again = opened(path), opened(path)
    assert first["count"] == again["count"] == count
    assert first["seconds"] < 60 and again["seconds"] < 60 and max(first["mib"], again["mib"]) < 256, (first, again)
    figures("tar_members", members=count, seconds_to_index=first["seconds"], seconds_with_index=again["seconds"],
            peak_mib=first["mib"])  # fmt: skip
