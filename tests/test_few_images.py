"""What benchmarks/few_images.py measures, and that the stored rows are of the recipe as it is."""

import sys

import numpy as np
import pandas as pd
import pytest

import temi
from benchmarks import few_images


def test_a_seed_draws_the_images():
    features = temi.embed(temi.load_images("digits"), progress=False)
    x, classes = few_images.drawn(features, 150, 3)
    same, _ = few_images.drawn(features, 150, 3)
    np.testing.assert_array_equal(x, same)
    assert len(np.unique(x, axis=0)) == len(classes) == 150
    assert not np.array_equal(x, few_images.drawn(features, 150, 4)[0])


def test_rows_that_are_there_stay(monkeypatch, tmp_path):
    trained = []

    def train(x, config, progress):
        trained.append((len(x), config.epochs, config.seed))
        return type("Run", (), {"labels": np.zeros(len(x), int), "config": config})

    monkeypatch.setattr(few_images, "FILE", tmp_path / "few.csv")
    monkeypatch.setattr(temi, "train", train)
    monkeypatch.setattr(sys, "argv", ["few_images.py", "--seeds", "2"])
    few_images.main()
    assert trained == [(n, e, s) for s in (0, 1) for n in (150, 300, 600) for e in (20, None)]
    few_images.main()
    assert len(trained) == 12
    table = pd.read_csv(tmp_path / "few.csv")
    assert len(table) == 18
    assert table["acc"].between(0, 1).all()


@pytest.mark.parametrize("images", few_images.IMAGES)
def test_stored_rows_are_of_the_recipe(images):
    table = pd.read_csv(few_images.FILE)
    epochs = table.query("images == @images and method == '260 steps'")["epochs"].unique()
    assert epochs.tolist() == [temi.TrainConfig(num_clusters=10).resolve(images).epochs]
