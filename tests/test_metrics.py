import itertools

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from temi.metrics import (
    cluster_accuracy,
    cluster_statistics,
    evaluate,
    match_clusters,
    matched_counts,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("clusters", "classes"), [(4, 4), (3, 5), (6, 4)])
def test_accuracy_is_the_best_over_all_matchings(clusters, classes):
    """Against trying every one-to-one matching."""
    labels, truth = RNG.integers(clusters, size=60), RNG.integers(classes, size=60)
    padded = range(max(clusters, classes))
    best = max((np.array(p)[labels] == truth).mean() for p in itertools.permutations(padded))
    assert cluster_accuracy(labels, truth) == pytest.approx(best)


def test_scores_of_a_perfect_and_of_a_relabelled_clustering():
    truth = RNG.integers(5, size=100)
    assert evaluate(truth, truth) == pytest.approx(dict(acc=1, nmi=1, anmi=1, ari=1))
    labels = RNG.integers(5, size=100)
    relabelled = RNG.permutation(5)[labels] + 7
    assert evaluate(labels, truth) == pytest.approx(evaluate(relabelled, truth))


def test_scores_are_scikit_learns():
    labels, truth = RNG.integers(4, size=80), RNG.integers(3, size=80)
    scores = evaluate(labels, truth)
    assert scores["nmi"] == sklearn_metrics.normalized_mutual_info_score(truth, labels)
    assert scores["anmi"] == sklearn_metrics.adjusted_mutual_info_score(truth, labels)
    assert scores["ari"] == sklearn_metrics.adjusted_rand_score(truth, labels)


def test_one_cluster_and_all_singletons():
    truth = np.repeat([0, 1], 10)
    assert evaluate(np.zeros(20, int), truth)["acc"] == 0.5
    assert evaluate(np.zeros(20, int), truth)["nmi"] == 0
    assert evaluate(np.arange(20), truth)["acc"] == 0.1


def test_matching():
    assert match_clusters(np.array([4, 4, 4, 9, 9, 2]), np.array([1, 1, 0, 0, 0, 0])) == {
        4: 1,
        9: 0,
    }


def test_matched_counts_have_what_is_right_on_the_diagonal():
    labels, classes = np.array([4, 4, 4, 9, 9, 2]), np.array([1, 1, 0, 0, 0, 0])
    table = matched_counts(labels, classes)
    assert table.columns.to_list() == [9, 4, 2]  # of class 0, of class 1, of none
    assert table.to_numpy().tolist() == [[2, 1, 1], [0, 2, 0]]


@pytest.mark.parametrize("labels", [[], [0, 1]])
def test_bad_labels(labels):
    with pytest.raises(ValueError, match="at least one, is needed"):
        evaluate(labels, [] if not labels else [0, 1, 2])


def test_statistics():
    statistics = cluster_statistics(np.array([0, 0, 1, 1]), 4)
    assert statistics["sizes"] == [2, 2, 0, 0]
    assert statistics["empty_clusters"] == 2
    assert statistics["entropy"] == pytest.approx(np.log(2))
    assert statistics["balance"] == pytest.approx(0.5)
    assert cluster_statistics(np.zeros(3, int), 2)["balance"] == 0
