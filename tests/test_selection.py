"""How many clusters the images suggest."""

import numpy as np
import pytest

import temi


def crowds(count, per_crowd=60, dim=20, seed=0):
    """So many well separated crowds."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(count, dim))
    x = np.repeat(centers, per_crowd, axis=0) + 0.1 * random.normal(size=(count * per_crowd, dim))
    return x.astype(np.float32)


@pytest.mark.parametrize("count", [3, 8, 15])
def test_separate_crowds_are_counted(count):
    found = temi.suggest_num_clusters(crowds(count), progress=False)
    assert found.num_clusters == count
    row = found.curve.set_index("num_clusters").loc[count]
    assert row["stability"] > 0.99
    assert row["silhouette"] > 0.8


def test_the_same_seed_gives_the_same_curve():
    x = crowds(5)
    first, second = (temi.suggest_num_clusters(x, seed=1, progress=False) for _ in range(2))
    assert first.curve.equals(second.curve)


def test_only_the_candidates_are_tried():
    found = temi.suggest_num_clusters(crowds(5), [4, 6], progress=False)
    assert found.curve["num_clusters"].tolist() == [4, 6]
    assert found.num_clusters in (4, 6)


def test_noise_has_no_stable_number():
    x = np.random.default_rng(0).normal(size=(600, 30)).astype(np.float32)
    curve = temi.suggest_num_clusters(x, progress=False).curve
    assert curve["stability"].max() < 0.5
    assert curve["silhouette"].max() < 0.1


def test_what_does_not_fit_is_refused():
    x = crowds(3)
    with pytest.raises(ValueError, match="candidates: 1; whole numbers from 2 to 90 are"):
        temi.suggest_num_clusters(x, [1, 2])
    with pytest.raises(ValueError, match=r"candidates: 2\.0; whole numbers from 2"):
        temi.suggest_num_clusters(x, candidates=[2.0])
    with pytest.raises(ValueError, match="12 images are too few to choose by; give num_clusters"):
        temi.suggest_num_clusters(x[:12])


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # k-means says it, too
def test_images_that_are_nearly_all_the_same_are_refused():
    x = np.ones((200, 3))
    x[7, 0] = 2
    with pytest.raises(ValueError, match="too many images are the same to choose by; give num_clu"):
        temi.suggest_num_clusters(x, progress=False)


def test_no_candidates_are_refused():
    with pytest.raises(ValueError, match="candidates: none; give one or more, or None"):
        temi.suggest_num_clusters(np.random.default_rng(0).normal(size=(80, 3)), [])


def test_images_in_the_order_of_their_kinds(monkeypatch):
    monkeypatch.setattr("temi.selection.IMAGES", 200)
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(8, 20)), 60, axis=0) + 0.1 * rng.normal(size=(480, 20))
    x = x.astype(np.float32)
    assert temi.suggest_num_clusters(x, progress=False).num_clusters == 8
    temi.suggest_num_clusters(x[:80], [2], seed=2**32 - 1, progress=False)


def test_the_suggestion_is_where_the_silhouette_is_highest():
    x = np.random.default_rng(0).normal(size=(600, 30)).astype(np.float32)
    found = temi.suggest_num_clusters(x, progress=False)
    assert found.num_clusters == found.curve["num_clusters"][found.curve["silhouette"].argmax()]
    assert not found.curve.equals(temi.suggest_num_clusters(x, seed=1, progress=False).curve)


def test_both_halves_say_how_well_clusters_are_apart(monkeypatch):
    asked = []
    monkeypatch.setattr("temi.selection.silhouette", lambda x, said, seed: asked.append(said) or 0)
    temi.suggest_num_clusters(crowds(3), [3], progress=False)
    assert len(asked) == 2 * 4  # halves of each of the repetitions
