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


def strip(figure, row=0):
    return figure.axes[row].images[0].get_array()


def test_clusters_are_drawn_largest_and_surest_first():
    images = np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    labels, agreement = np.array([1, 0, 0, 1, 0, 0]), np.array([1, 0.5, 1, 0.5, 0.75, 0.25])
    figure = plots.cluster_rows(images, labels, agreement, per_row=3)
    assert [axis.get_ylabel() for axis in figure.axes] == ["0  (4)", "1  (2)"]
    shown = [strip(figure, row)[2, 2::6].tolist() for row in (0, 1)]
    assert shown == [[2, 4, 1], [0, 3, 255]]
    assert strip(figure)[0, 0] == 255  # a white line around each picture
    assert figure.axes[0].images[0].get_clim() == (0, 255)


def test_of_very_many_clusters_the_largest_are_shown():
    images, labels = np.zeros((9, 4, 4), np.uint8), np.array([3, 1, 0, 1, 2, 2, 2, 1, 1])
    figure = plots.cluster_rows(images, labels, np.ones(9), most=2)
    assert [axis.get_ylabel() for axis in figure.axes] == ["1  (4)", "2  (3)"]
    assert figure.get_supxlabel() == "the 2 largest of 4 clusters"
    assert not plots.cluster_rows(images, labels, np.ones(9), most=4).get_supxlabel()


def test_pictures_of_unequal_sizes_or_large_ones_are_shown_as_squares():
    grey, wide = np.zeros((10, 10), np.uint8), np.zeros((20, 30, 3), np.uint8)
    wide[..., 0] = 200
    assert strip(plots.image_rows([grey, wide], [[0, 1]], [""])).shape == (66, 132, 3)
    assert strip(plots.image_rows([grey, wide], [[0, 1]], [""]))[33, 99].tolist() == [200, 0, 0]
    large = np.zeros((1, 65, 65), np.uint8)
    assert strip(plots.image_rows(large, [[0]], [""])).shape == (66, 66, 3)
    assert strip(plots.image_rows(large[:, :64, :64], [[0]], [""])).shape == (66, 66)


def test_pictures_keep_the_order_asked_for():
    images = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    assert strip(plots.image_rows(images, [[2, 0, 1]], [""]))[2, 2::6].tolist() == [2, 0, 1]


def test_votes_are_counted_whole():
    figure = plots.agreement_histogram(np.array([1, 29 / 50, 0.58]), 50)  # 0.58 * 50 < 29
    bars = {round(p.get_x() + p.get_width() / 2): p.get_height() for p in figure.axes[0].patches}
    assert {x: h for x, h in bars.items() if h} == {29: 2, 50: 1}


def test_curves_stand_beside_the_largest_entropy():
    history = [{"epoch": e, "head_losses": [-e, -2 * e], "marginal_entropy": 2.0} for e in (1, 2)]
    left, right = plots.training_curves(history, 10).axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[-1, -2], [-2, -4]]
    assert right.lines[1].get_ydata()[0] == pytest.approx(np.log(10))
    assert right.get_ylim() == pytest.approx((0, 1.1 * np.log(10)))


def test_planes_are_drawn_from_the_bottom():
    grid = np.zeros((1, 5, 5), int)
    grid[0, 0] = 1  # the lowest row
    axis = plots.planes(np.zeros((1, 2)), grid, ["a"]).axes[0]
    assert axis.images[0].origin == "lower"
    assert len(axis.collections) == 2  # an outline of one cluster, and the points


def test_no_picture_at_all_is_a_blank_row():
    assert (strip(plots.image_rows([], [[], []], ["none", "neither"]), 1) == 255).all()


def test_steppers_beside_each_other(frames):
    one, other = (plots.stepper(f, ["0", "1"], "<b>", "a") for f in (frames[:2], frames[1:]))
    assert "<legend>&lt;b&gt;</legend>" in one
    assert "steps(2)" in one
    assert one.split('class="')[1].split('"')[0] != other.split('class="')[1].split('"')[0]
