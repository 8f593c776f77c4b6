"""Figures: what they hold, not how they look."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from temi import plots


@pytest.fixture
def frames():
    grids = np.zeros((3, 1, 20, 20), dtype=int)
    for row, grid in enumerate(grids):
        grid[0, :, : 5 * (row + 1)] = 1
    points = np.zeros((1, 2))
    return [plots.planes(points, grid, ["a head"]) for grid in grids]


class Elements(HTMLParser):
    """(name, attributes) of each element."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def test_planes_have_a_panel_for_each_grid():
    grids = np.arange(3)[:, None, None].repeat(5, axis=1).repeat(5, axis=2)
    figure = plots.planes(np.zeros((4, 2)), grids, ["one", "two", "three"], ylabel="all")
    assert [axis.get_title() for axis in figure.axes] == ["one", "two", "three"]
    assert figure.axes[0].get_ylabel() == "all"


def test_stepper_has_a_button_for_each_frame_and_one_to_play(frames):
    page = Elements(plots.stepper(frames, ["0", "1", "<2>"], "epoch", 'a "head"'))
    buttons = page.all("input")
    assert len(buttons) == 4
    assert len({button["name"] for button in buttons}) == 1
    assert [button["id"] for button in buttons] == [label["for"] for label in page.all("label")]
    assert ["checked" in button for button in buttons] == [False, False, True, False]
    assert page.all("img")[0]["alt"] == 'a "head"'


def test_stepper_shows_the_frame_of_each_button(frames):
    page = plots.stepper(frames, ["0", "1", "2"], "epoch", "a head")
    shifts = [float(shift) for shift in re.findall(r"checked ~ div img .*\(-([\d.]+)%", page)]
    assert shifts == pytest.approx([0, 100 / 3, 200 / 3], abs=1e-3)
    strip = Image.open(BytesIO(b64decode(re.search('base64,([^"]+)', page)[1])))
    height = strip.height // 3
    assert f"aspect-ratio: {strip.width} / {height}" in page
    rows = [np.asarray(strip)[row * height : (row + 1) * height].mean() for row in range(3)]
    assert len(set(rows)) == 3


def test_stepper_needs_nothing_from_elsewhere(frames):
    page = plots.stepper(frames, ["0", "1", "2"], "epoch", "a head")
    assert "<script" not in page
    assert "http" not in page
    assert page._repr_html_() == page
    assert len(repr(page)) < 50
