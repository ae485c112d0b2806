"""Pages opened in headless Chromium, without a network."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")


def screenshot(page: Path, shot: Path, fragment: str = "", size: tuple[int, int] = (1300, 1500)) -> np.ndarray:
    """What a window of so many pixels shows of a page, (H, W, 3) uint8. Skips the test where there is no Chromium."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium on this machine ({', '.join(NAMES)})")
    # A network of its own with nothing in it; where that is not permitted, no name leads anywhere.
    apart = ["unshare", "-n"] if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0 else []
    done = subprocess.run(
        [
            *apart, found, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND", "--force-device-scale-factor=1",
            "--force-color-profile=srgb",
            f"--user-data-dir={shot.with_suffix('.profile')}", f"--window-size={size[0]},{size[1]}",
            f"--screenshot={shot}", f"{page.resolve().as_uri()}{fragment}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and shot.is_file(), done.stderr[-2000:]
    with Image.open(shot) as image:
        return np.asarray(image.convert("RGB"))


def embedded(page: Path) -> list[np.ndarray]:
    """The PNG pictures inside of a page, in their order."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page.read_text())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def places(shot: np.ndarray, picture: np.ndarray, tolerance: int = 0) -> list[tuple[int, int]]:
    """Where a picture stands in a screenshot, each (row, column) of its upper left corner; tolerance: the mean
    difference of a pixel's channels that is let pass."""
    (h, w), ours, theirs = picture.shape[:2], shot.astype(np.int16), picture.astype(np.int16)
    tops, lefts = shot.shape[0] - h + 1, shot.shape[1] - w + 1
    if tops < 1 or lefts < 1:
        return []
    rows, columns = np.indices((tops, lefts)).reshape(2, -1)
    # Some points of the picture tell nearly every place where it is not.
    points, apart = np.random.default_rng(0).integers((h, w), size=(48, 2)), 0.0
    for y, x in points:
        apart = apart + np.abs(ours[rows + y, columns + x] - theirs[y, x]).mean(-1)
        likely = apart <= 2 * tolerance * len(points)
        rows, columns, apart = rows[likely], columns[likely], apart[likely]
    return [
        (int(top), int(left))
        for top, left in zip(rows, columns, strict=True)
        if np.abs(ours[top : top + h, left : left + w] - theirs).mean() <= tolerance
    ]


def count_colour(shot: np.ndarray, colour: str) -> int:
    """Pixels of exactly the colour `#rrggbb`."""
    return int((shot == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())
