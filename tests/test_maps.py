"""Places on a plane: similar images are close, and many images cost no more than the drawn ones."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import temi


def three_crowds(per_crowd):
    random = np.random.default_rng(0)
    crowds = np.repeat(np.arange(3), per_crowd)
    x = random.normal(size=(3, 60))[crowds] + 0.3 * random.normal(size=(3 * per_crowd, 60))
    return x.astype(np.float32), crowds


def test_crowds_stay_together_drawn_or_not():
    x, crowds = three_crowds(60)
    for max_images in (10_000, 90):
        points = temi.map_points(x, max_images=max_images)
        assert points.shape == (180, 2)
        assert points.dtype == np.float32
        assert np.isfinite(points).all()
        np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-5)
        neighbors = KNeighborsClassifier(5).fit(points, crowds)
        assert neighbors.score(points, crowds) > 0.98


def test_the_same_seed_gives_the_same_map():
    x, _ = three_crowds(20)
    np.testing.assert_array_equal(temi.map_points(x, seed=3), temi.map_points(x, seed=3))


def test_a_handful_of_images_has_a_map():
    assert temi.map_points(np.eye(5, dtype=np.float32)).shape == (5, 2)


@pytest.mark.parametrize("shape", [(1, 5), (3, 5), (30, 8)])
def test_what_cannot_be_told_apart_is_in_one_place(shape):
    points = temi.map_points(np.ones(shape, dtype=np.float32))
    np.testing.assert_array_equal(points, np.zeros((shape[0], 2)))


def test_a_map_of_one_dimension():
    assert np.isfinite(temi.map_points(np.arange(30, dtype=np.float32)[:, None])).all()


def test_a_tensor_is_laid_out_as_its_numbers_are():
    x, _ = three_crowds(20)
    np.testing.assert_array_equal(temi.map_points(torch.from_numpy(x)), temi.map_points(x))


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (temi.Features.from_array(np.eye(5)), r"x of object \(\)"),
        (np.ones(5), r"x of float64 \(5,\)"),
        ([["a", "b"]], r"x of <U1 \(1, 2\)"),
        (np.array([[1.0, np.nan]] * 5), "NaN"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(x, what):
    with pytest.raises(ValueError, match=what):
        temi.map_points(x)


def test_images_drawn_for_the_map_keep_their_place_and_scale():
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    points = temi.map_points(x, max_images=40)
    assert points[:, 0].std() == pytest.approx(1, rel=1e-3)


def test_images_drawn_for_the_map_keep_their_place():
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    drawn = np.sort(np.random.default_rng(0).permutation(60)[:40])
    some, alone = temi.map_points(x, max_images=40)[drawn], temi.map_points(x[drawn])
    for axis in range(2):  # but for where the middle is, and the scale
        assert np.corrcoef(some[:, axis], alone[:, axis])[0, 1] > 0.9999
