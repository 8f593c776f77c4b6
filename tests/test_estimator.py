import copy
import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits, make_blobs
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import temi

SMALL = dict(n_heads=2, epochs=40, random_state=0, device="cpu")


@pytest.mark.filterwarnings("ignore:the heads hardly")  # in numbers drawn at random
@parametrize_with_checks([temi.TEMI(n_clusters=3, **SMALL)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def blobs():
    x, y = make_blobs(300, 8, centers=5, random_state=0)
    return x - x.mean(axis=0), y


@pytest.fixture(scope="module")
def fitted(blobs):
    return temi.TEMI(n_clusters=5, **SMALL).fit(blobs[0])


def test_it_finds_the_groups_and_says_where_new_rows_belong(blobs, fitted):
    x, y = blobs
    assert adjusted_rand_score(fitted.labels_, y) > 0.95
    np.testing.assert_array_equal(fitted.predict(x), fitted.labels_)
    new, classes = make_blobs(200, 8, centers=5, random_state=0)  # the same centres
    assert adjusted_rand_score(fitted.predict(new - new.mean(axis=0)), classes) > 0.95


def test_a_cluster_that_was_left_out_leaves_its_rows_to_the_others(blobs, fitted):
    model = copy.copy(fitted)
    model._kept = np.array([0, 2, 3, 4])
    clusters, probs = model.run_.predict(blobs[0]), model.run_.predict_proba(blobs[0])
    assert (clusters == 1).any()
    likeliest = probs[:, model._kept].argmax(axis=1)
    expected = np.where(clusters == 1, likeliest, np.searchsorted(model._kept, clusters))
    np.testing.assert_array_equal(model.predict(blobs[0]), expected)


def test_probabilities(blobs, fitted):
    probs = fitted.predict_proba(blobs[0])
    assert probs.shape == (300, fitted.n_clusters_)
    np.testing.assert_allclose(probs.sum(axis=1), 1)
    assert (probs.argmax(axis=1) == fitted.labels_).mean() > 0.95
    np.testing.assert_array_equal(fitted.transform(blobs[0]), probs)


def test_it_is_the_training_of_temi_train(blobs, fitted):
    run = temi.train(blobs[0], fitted.run_.config, progress=False)
    assert (run.predict(blobs[0]) == fitted.run_.predict(blobs[0])).all()
    assert fitted.batch_size_ == run.config.batch_size
    assert fitted.n_neighbors_ == run.config.num_neighbors == round((300 / 5) ** 0.5)


def test_pickle_clone_and_seed(blobs, fitted):
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(blobs[0]), fitted.predict_proba(blobs[0]))
    np.testing.assert_array_equal(clone(fitted).fit_predict(blobs[0]), fitted.labels_)


def test_empty_clusters_are_left_out_of_the_numbers(blobs):
    x, _ = blobs
    model = temi.TEMI(n_clusters=60, **(SMALL | {"epochs": 2})).fit(x)
    assert model.n_clusters_ < 60
    np.testing.assert_array_equal(np.unique(model.labels_), np.arange(model.n_clusters_))
    new = np.random.default_rng(0).normal(size=(2000, 8)) * 10
    labels = model.predict(new)  # some in clusters that had no row
    assert set(labels) <= set(range(model.n_clusters_))
    assert not np.isin(model.run_.predict(new), model._kept).all()


@pytest.mark.filterwarnings("ignore:the heads hardly")  # there is nothing to find
def test_few_rows_cut_neighbours_and_batch():
    x = np.random.default_rng(0).normal(size=(12, 4))
    model = temi.TEMI(n_clusters=2, n_neighbors=50, batch_size=512, **SMALL).fit(x)
    assert (model.n_neighbors_, model.batch_size_) == (11, 12)


def test_one_cluster(blobs):
    model = temi.TEMI(n_clusters=1).fit(blobs[0])
    assert (model.labels_ == 0).all()
    assert (model.predict(blobs[0]) == 0).all()
    assert model.predict_proba(blobs[0]).shape == (300, 1)
    assert model.score(blobs[0]) == 0


@pytest.mark.parametrize("clusters", [0, 301, 2.5, "ten"])
def test_a_number_of_clusters_that_cannot_be(blobs, clusters):
    with pytest.raises(ValueError, match=r"n_clusters=.*: a whole number from 1 to n_samples=300"):
        temi.TEMI(n_clusters=clusters).fit(blobs[0])


def test_in_a_pipeline_and_a_grid_search_without_labels(blobs):
    x, y = blobs
    pipeline = make_pipeline(StandardScaler(), temi.TEMI(n_clusters=5, **SMALL))
    assert adjusted_rand_score(pipeline.fit_predict(x), y) > 0.95
    search = GridSearchCV(pipeline, {"temi__learning_rate": [1e-6, 4e-3]}, cv=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search.fit(x)  # a learning rate that learns nothing loses
    assert search.best_params_ == {"temi__learning_rate": 4e-3}
    assert 0 < search.best_score_ <= np.log(5) + 1e-9


def test_digits():
    digits = load_digits()
    model = temi.TEMI(n_clusters=10, n_heads=4, epochs=10, random_state=0, device="cpu")
    labels = model.fit_predict(digits.data)
    assert temi.evaluate(labels, digits.target)["acc"] > 0.7


@pytest.mark.parametrize("n_clusters", [1, 3])
def test_settings_are_refused_by_their_names_here(n_clusters):
    for name, value in {"n_heads": 0, "n_neighbors": 0, "beta": 2.0, "batch_size": 0}.items():
        with pytest.raises(ValueError, match=f"^{name}={value}: "):
            temi.TEMI(n_clusters, **{name: value}).fit(
                np.random.default_rng(0).normal(size=(40, 4))
            )


def test_settings_of_the_estimator_reach_the_training():
    model = temi.TEMI(2, recipe="paper", n_heads=3, beta=0.7, n_neighbors=4, batch_size=20,
                      learning_rate=1e-3, epochs=5, normalize="l2", device="cpu")  # fmt: skip
    assert model._config(100, 6) == temi.TrainConfig(
        num_clusters=2, recipe="paper", num_heads=3, beta=0.7, num_neighbors=4, batch_size=20,
        learning_rate=1e-3, epochs=5, normalize="l2", seed=6, device="cpu",
    )  # fmt: skip


def test_more_clusters_than_different_rows_are_too_many():
    x = np.repeat(np.random.default_rng(0).normal(size=(3, 6)), 40, axis=0)
    with pytest.raises(ValueError, match="n_clusters=8: up to 3 is allowed, as X has no more"):
        temi.TEMI(8, random_state=0).fit(x)
