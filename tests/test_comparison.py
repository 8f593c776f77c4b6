"""The tables of methods and of unbalanced data: rows as said, what is there is skipped."""

import dataclasses

import numpy as np
import pytest

from benchmarks import comparison
from benchmarks.unbalanced import class_sizes, thinned
from temi.embeddings import Features
from temi.metrics import evaluate

RNG = np.random.default_rng(0)


@pytest.fixture
def features():
    classes = np.repeat(np.arange(3), 40)
    x = RNG.normal(size=(3, 8))[classes] * 3 + RNG.normal(size=(120, 8))
    made = Features.from_array(x.astype(np.float32), "tiny")
    return dataclasses.replace(made, labels=classes, class_names=("a", "b", "c"))


@pytest.fixture
def runs(features, monkeypatch):
    base = {"device": "cpu", "epochs": 1, "num_heads": 2, "batch_size": 16, "num_neighbors": 5}
    monkeypatch.setattr(comparison, "BASE", base)

    def make(**changes):
        return [(features, comparison.plan(features, "k-means", 0)),
                (features, comparison.plan(features, "fast", 0, **changes))]  # fmt: skip

    return make


def test_rows_are_kept_and_changed_settings_redone(runs, tmp_path, monkeypatch):
    file, done, measure = tmp_path / "table.csv", [], comparison.measure

    def noting(features, row):
        done.append(row["method"])
        return measure(features, row)

    monkeypatch.setattr(comparison, "measure", noting)
    table = comparison.complete(file, runs())
    readings = ["raw", "centred + L2", "mean head", "lowest-loss head", "vote", "soft consensus"]
    assert table["reading"].to_list() == readings
    assert table[[*comparison.SCORES, "recall", "balance"]].notna().all(axis=None)
    assert done == ["k-means", "fast"]
    assert comparison.complete(file, runs()).equals(table)
    assert len(done) == 2
    again = comparison.complete(file, runs(clip_grad=1.0))
    assert done[2:] == ["fast"]
    assert len(again) == len(table)


def test_a_collapse_is_a_row(runs, tmp_path, monkeypatch):
    def collapse(*arguments, **options):
        raise comparison.DivergenceError(1, None, [0, 1], 0.1)

    monkeypatch.setattr(comparison.temi, "train", collapse)
    table = comparison.complete(tmp_path / "table.csv", runs())
    failed = table[table["failed"].notna()]
    assert failed["method"].to_list() == ["fast"]
    assert failed["acc"].isna().all()
    assert comparison.complete(tmp_path / "table.csv", runs()).equals(table)


def test_the_mean_head_is_the_mean_of_their_scores(features):
    heads = RNG.integers(3, size=(4, 120))
    accuracies = [evaluate(labels, features.labels)["acc"] for labels in heads]
    assert comparison.scores(heads, features)["acc"] == pytest.approx(np.mean(accuracies), abs=1e-4)


def test_class_sizes_fall_by_the_ratio():
    sizes = class_sizes(1000, 10, 50)
    assert sizes[[0, -1]].tolist() == [1000, 20]
    np.testing.assert_allclose(sizes[1:] / sizes[:-1], 50 ** (-1 / 9), rtol=0.02)


def test_thinned_images_keep_rows_and_classes_together(features):
    part = thinned(features, 10, seed=1)
    assert sorted(np.bincount(part.labels)) == sorted(class_sizes(40, 3, 10))
    rows = [int(name) for name in part.ids]
    np.testing.assert_array_equal(part.x, features.x[rows])
    np.testing.assert_array_equal(part.labels, features.labels[rows])
    assert part.manifest["sha256"] != thinned(features, 10, seed=2).manifest["sha256"]
    assert part.dataset == "tiny 1:10"
