"""report.html of a comparison in a browser without a network: its picture, and its figures in the arms' colours."""

import numpy as np
import pytest
from PIL import Image

from browser import count_colour, embedded, places, screenshot
from fcmae.compare import main
from fcmae.comparison.figures import COLOURS
from small_comparison import arguments, labelled, make_place

WIDTH = 992  # 62 rem, of the page's content, in a window that is wider


@pytest.mark.slow
def test_the_report_shows_its_picture_and_figures(tmp_path):
    place = make_place(tmp_path)
    assert main(arguments(place, tmp_path / "out", "budget.steps=3", "checkpoint.every=3", labelled(place))) == 0
    page = tmp_path / "out" / "report.html"
    shot = screenshot(page, tmp_path / "shot.png", size=(1300, 4000))
    [picture] = embedded(page)
    scaled = Image.fromarray(picture).resize((WIDTH, round(WIDTH * picture.shape[0] / picture.shape[1])))
    middle = np.asarray(scaled)[20:-20, 20:-20]
    [(top, left), *_] = places(shot, middle, tolerance=3)
    assert not places(shot, middle[::-1], tolerance=3) and not places(shot, middle[:, ::-1], tolerance=3)
    above, below = shot[: top - 20], shot[top + middle.shape[0] + 20 :]
    # The loss curves stand above the picture, bars and distances below it, one colour an arm.
    for colour in COLOURS[:2]:
        assert count_colour(above, colour) > 100 and count_colour(below, colour) > 300
    assert all(count_colour(shot, colour) == 0 for colour in COLOURS[2:5])
    words = (above[:300] < 100).all(-1).sum()  # the heading and the lead are dark on white
    assert words > 1500 and (shot[:20] == 255).all()
