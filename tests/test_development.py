"""What benchmarks/development.py trains, and on which part of the data."""

import sys

import numpy as np
import pandas as pd
import pytest

import temi
from benchmarks import development
from temi.embeddings import Features


@pytest.fixture
def features(tmp_path) -> Features:
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 4
    x = rng.normal(size=(4, 8))[labels] + 0.1 * rng.normal(size=(100, 8))
    np.savez(tmp_path / "x.npz", X=x.astype(np.float32), y=labels)
    return temi.load_features(tmp_path / "x.npz")


def test_a_variant_is_fast_but_for_what_its_name_says(features):
    def changed(variant: str) -> dict:
        fast, other = (
            vars(development.config_of(name, features, 3, "cpu").resolve(100))
            for name in ("fast", variant)
        )
        return {name: other[name] for name in fast if other[name] != fast[name]}

    assert development.config_of("fast", features, 3, "cpu").changes() == {
        "num_clusters": 4, "seed": 3, "precision": "fp32", "epochs": 20
    }  # fmt: skip
    assert changed("fewer neighbours") == {"num_neighbors": 2, "group_size": 3}  # of root(100 / 4)
    assert changed("mutual neighbours") == {"mutual_neighbors": True}
    assert changed("adaptive neighbours") == {}
    assert changed("128 components") == {"pca_dim": 128}
    assert changed("three quarters of the epochs") == {"epochs": 15}
    assert set(changed("fewer neighbours, groups of six, 32 heads")) == {
        "num_neighbors", "num_heads", "group_size"
    }  # fmt: skip


def test_development_data_are_the_first_images_of_the_first_classes(monkeypatch):
    monkeypatch.setattr(development, "CLASSES", 3)
    monkeypatch.setattr(development, "OF_A_CLASS", 2)
    digits = temi.load_images("digits")
    part = development.first_of_each_class(digits)
    rows = [np.flatnonzero(digits.labels == label)[:2] for label in range(3)]
    assert part.ids == tuple(digits.ids[row] for row in sorted(np.concatenate(rows)))
    assert part.name == "digits-development"
    assert part.num_classes == 3


def test_rows_that_are_there_stay(features, monkeypatch, tmp_path):
    trained = []

    def train(features, config, neighbors=None, **_):
        trained.append((config.seed, neighbors is not None))
        return type("Run", (), {"labels": features.labels})

    file = tmp_path / "development.csv"
    monkeypatch.setattr(development, "FILE", file)
    monkeypatch.setattr(
        development, "VARIANTS", {name: {} for name in ("fast", "adaptive neighbours")}
    )
    monkeypatch.setattr(development.temi, "train", train)
    command = ["development.py", "--features", f"blobs={tmp_path / 'x.npz'}", "--seeds"]
    for seeds in ("1", "2"):
        monkeypatch.setattr(sys, "argv", [*command, seeds])
        development.main()
    of_digits_and_blobs = 2 * [(0, False), (0, True)] + 2 * [(1, False), (1, True)]
    assert trained == of_digits_and_blobs
    table = pd.read_csv(file)
    assert table.groupby("dataset").size().to_dict() == {"blobs": 4, "digits": 4}
    assert (table["acc"] == 1).all()
    assert set(table["images"]) == {100, 899}
