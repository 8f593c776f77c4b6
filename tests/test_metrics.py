import itertools
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap
from sklearn import metrics as sklearn_metrics
from sklearn.cluster import KMeans

from temi import metrics
from temi.baselines import kmeans
from temi.embeddings import normalize
from temi.metrics import (
    class_recall,
    cluster_accuracy,
    cluster_statistics,
    confidence_interval,
    coverage_curve,
    evaluate,
    learnability,
    match_clusters,
    matched_counts,
    neighbor_information,
    purity,
    silhouette,
    stability,
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
    texts = np.array(["dog", "dog", "dog", "cat"])
    assert match_clusters(np.array([1, 1, 0, 0]), texts) == {1: "dog", 0: "cat"}
    assert class_recall(np.array([1, 1, 0, 0]), texts)["dog"] == pytest.approx(2 / 3)


def test_matched_counts_have_what_is_right_on_the_diagonal():
    labels, classes = np.array([4, 4, 4, 9, 9, 2]), np.array([1, 1, 0, 0, 0, 0])
    table = matched_counts(labels, classes)
    assert table.columns.to_list() == [9, 4, 2]  # of class 0, of class 1, of none
    assert table.to_numpy().tolist() == [[2, 1, 1], [0, 2, 0]]


def test_similar_classes_stand_side_by_side():
    """Classes 0 and 2 share clusters, so do 1 and 3; every order keeps all counts."""
    classes = np.repeat([0, 1, 2, 3], 20)
    labels = np.concatenate([np.arange(20) % 20 // 15 * 2 + c for c in (0, 1)] +
                            [2 - np.arange(20) // 15 * 2 + c for c in (0, 1)])  # fmt: skip
    table = matched_counts(labels, classes, by_similarity=True)
    order = table.index.to_list()
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    assert np.trace(table.to_numpy()) == np.trace(matched_counts(labels, classes).to_numpy()) == 60
    two = matched_counts(np.array([5, 5, 4]), np.array([0, 0, 1]), by_similarity=True)
    assert two.columns.to_list() == [5, 4]


def test_coverage_by_hand():
    classes, labels = np.array([0, 0, 0, 1, 1]), np.array([7, 7, 8, 8, 8])
    sure = np.array([0.9, 0.2, 0.5, 0.5, 0.1])  # wrong: the third, as sure as the fourth
    expected = [1, 1.5 / 2, 2 / 3, 3 / 4, 4 / 5]
    assert coverage_curve(labels, classes, sure).tolist() == pytest.approx(expected)
    other = [4, 3, 2, 1, 0]
    turned = coverage_curve(labels[other], classes[other], sure[other].astype(np.float16))
    assert turned.tolist() == pytest.approx(expected)
    assert expected[-1] == cluster_accuracy(labels, classes)
    with pytest.raises(ValueError, match=r"^sure: shape \(4,\), 0 of .* each of the 5 images"):
        coverage_curve(labels, classes, sure[:4])
    with pytest.raises(ValueError, match=r"^sure: shape \(5,\), 1 of them no number; "):
        coverage_curve(labels, classes, np.append(sure[:4], np.nan))


@pytest.mark.parametrize("labels", [[], [0, 1]])
def test_bad_labels(labels):
    with pytest.raises(ValueError, match="at least one, is needed"):
        evaluate(labels, [] if not labels else [0, 1, 2])


def test_labels_that_are_no_clusters_and_too_few_clusterings():
    with pytest.raises(ValueError, match="labels: 2 is no cluster of 2"):
        cluster_statistics(np.array([0, 1, 2]), 2)
    with pytest.raises(ValueError, match="clusterings: 1 given"):
        stability([np.array([0, 1])])


def test_nothing_to_score_against():
    with pytest.raises(ValueError, match="classes=None"):
        evaluate([0, 1], None)


def test_statistics():
    statistics = cluster_statistics(np.array([0, 0, 1, 1]), 4)
    assert statistics["sizes"] == [2, 2, 0, 0]
    assert statistics["empty_clusters"] == 2
    assert statistics["entropy"] == pytest.approx(np.log(2))
    assert statistics["balance"] == pytest.approx(0.5)
    assert cluster_statistics(np.zeros(3, int), 2)["balance"] == 0
    assert cluster_statistics(np.zeros(3, int), 1)["balance"] == 1


def test_purity_is_the_best_over_all_mappings_of_clusters_to_classes():
    labels, truth = RNG.integers(4, size=60), RNG.integers(3, size=60)
    mappings = itertools.product(range(3), repeat=4)
    best = max((np.array(mapping)[labels] == truth).mean() for mapping in mappings)
    assert purity(labels, truth) == pytest.approx(best)
    split = np.arange(60)
    assert purity(split, truth) == 1
    assert cluster_accuracy(split, truth) == pytest.approx(3 / 60)


def test_class_recall_by_hand():
    classes = np.array([0, 0, 0, 0, 1, 1, 2])
    labels = np.array([5, 5, 5, 7, 7, 7, 5])
    assert class_recall(labels, classes).to_dict() == {0: 0.75, 1: 1.0, 2: 0.0}


def test_recall_weighted_by_class_is_the_accuracy():
    labels, truth = RNG.integers(6, size=200), RNG.integers(4, size=200)
    recall = class_recall(labels, truth)
    shares = np.bincount(truth) / len(truth)
    assert (recall * shares).sum() == pytest.approx(cluster_accuracy(labels, truth))


def test_confidence_interval_is_that_of_a_proportion():
    """With the clusters named by hand, the score is a binomial share."""
    truth = np.tile([0, 1], 500)
    labels = np.where(np.arange(1000) % 5 == 0, 1 - truth, truth)  # right in four of five

    def share(labels, classes):
        return (labels == classes).mean()

    low, high = confidence_interval(labels, truth, share)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 1000)
    assert low == pytest.approx(0.8 - half, abs=0.006)
    assert high == pytest.approx(0.8 + half, abs=0.006)
    low, high = confidence_interval(labels, truth, resamples=200)
    assert low < cluster_accuracy(labels, truth) < high


def test_confidence_interval_of_many_images_takes_the_memory_of_some(monkeypatch):
    truth = np.tile([0, 1], 500)
    labels = np.where(np.arange(1000) % 5 == 0, 1 - truth, truth)
    expected = confidence_interval(labels, truth, resamples=50)
    monkeypatch.setattr(metrics, "DRAWN", 3000)
    tracemalloc.start()
    assert confidence_interval(labels, truth, resamples=50) == expected
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 1000 * 8  # bytes of all resamples


def test_a_series_is_not_read_by_its_index():
    x, labels = np.eye(20, 3) + 1, np.arange(20) % 2
    with pytest.raises(ValueError, match="labels of type Series: a NumPy array is needed"):
        silhouette(x, pd.Series(labels, index=np.arange(20)[::-1]))


def test_stability():
    labels = RNG.integers(5, size=2000)
    renamed = RNG.permutation(5)[labels]
    other = RNG.integers(5, size=2000)
    assert stability([labels, renamed, renamed]) == pytest.approx(1)
    assert stability([labels, other]) == pytest.approx(0, abs=0.01)
    rand = sklearn_metrics.adjusted_rand_score(labels, other)
    assert stability([labels, renamed, other]) == pytest.approx((1 + 2 * rand) / 3)


def test_learnability_tells_what_the_features_explain_from_chance():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(4), 60)
    x = normalize(rng.normal(size=(4, 16))[classes] * 3 + rng.normal(size=(240, 16)), "center-l2")
    assert learnability(x, classes) > 0.95
    half_wrong = np.where(rng.random(240) < 0.5, rng.integers(4, size=240), classes)
    assert 0.1 < learnability(x, half_wrong) < 0.7
    assert abs(learnability(x, rng.integers(4, size=240))) < 0.05
    few = np.append(classes[:-1], 9)  # a cluster that only one part has
    assert learnability(x, few) > 0.9


def test_silhouette_of_all_images_is_scikit_learns():
    x, labels = RNG.normal(size=(90, 4)), RNG.integers(3, size=90)
    expected = sklearn_metrics.silhouette_score(x, labels, metric="cosine")
    assert silhouette(x, labels) == pytest.approx(expected, abs=1e-5)
    assert silhouette(x, labels, sample=60, seed=1) == silhouette(x, labels, sample=60, seed=1)


def test_neighbor_information_against_a_plain_loop():
    probs = RNG.dirichlet(np.ones(4), size=30)
    neighbors = np.stack([RNG.permutation(30)[:3] for _ in range(30)])
    joint = np.zeros((4, 4))
    for i in range(30):
        for j in neighbors[i]:
            joint += np.outer(probs[i], probs[j]) / 90
    rows, columns = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
    expected = (joint * np.log(joint / (rows * columns))).sum()
    assert neighbor_information(probs, neighbors) == pytest.approx(expected, rel=1e-6)


def test_neighbor_information_refuses_half_precision():
    with pytest.raises(ValueError, match=r"probs of float16: probs\.astype\('float32'\)"):
        neighbor_information(np.eye(6, dtype=np.float16), np.zeros((6, 1), dtype=int))


def test_neighbor_information_of_labels_is_scikit_learns():
    labels = RNG.integers(6, size=50)
    neighbors = np.stack([RNG.permutation(50)[:4] for _ in range(50)])
    pairs = np.repeat(labels, 4), labels[neighbors].ravel()
    expected = sklearn_metrics.mutual_info_score(*pairs)
    assert neighbor_information(labels, neighbors) == pytest.approx(expected)
    soft = neighbor_information(np.eye(6, dtype=np.float32)[labels], neighbors)
    assert soft == pytest.approx(expected, rel=1e-4)  # in float32


def test_neighbor_information_at_its_ends():
    sure = np.repeat(range(5), 4)
    same = np.arange(20).reshape(5, 4)[:, ::-1].reshape(20, 1)  # another of the same cluster
    assert neighbor_information(sure, same) == pytest.approx(np.log(5))
    assert neighbor_information(np.zeros(20, int), same) == 0
    assert neighbor_information(np.full((20, 5), 0.2), same) == pytest.approx(0, abs=1e-12)


def test_counts_are_by_place_whatever_the_index():
    classes = np.repeat(range(4), 50)
    shuffled = pd.Series(classes, index=np.random.default_rng(0).permutation(200))
    counts = matched_counts(shuffled, pd.Series(classes)).to_numpy()
    np.testing.assert_array_equal(counts, 50 * np.eye(4))


def test_silhouette_of_a_sample_is_that_of_its_seed():
    x, labels = RNG.normal(size=(90, 4)), RNG.integers(3, size=90)
    rows = np.random.default_rng(1).permutation(90)[:60]
    expected = sklearn_metrics.silhouette_score(x[rows], labels[rows], metric="cosine")
    assert silhouette(x, labels, sample=60, seed=1) == pytest.approx(expected, abs=1e-5)


def test_learnability_of_sorted_images_and_its_seed():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(4), 60)
    x = rng.normal(size=(4, 16))[classes] * 3 + rng.normal(size=(240, 16))
    x = normalize(x, "center-l2")
    assert learnability(x, classes, folds=4) > 0.95
    noisy = np.where(rng.random(240) < 0.5, rng.integers(4, size=240), classes)
    assert learnability(x, noisy, seed=0) != learnability(x, noisy, seed=1)


def test_one_class_alone_can_be_ordered():
    counts = matched_counts(np.array([0, 1]), np.array([3, 3]), by_similarity=True)
    assert counts.to_numpy().tolist() == [[1, 1]]


def test_what_would_give_no_score_is_refused():
    labels, x = np.arange(40) % 4, np.random.default_rng(0).normal(size=(40, 3))
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=f"level={level}: a share above 0 and below 1"):
            confidence_interval(labels, labels, level=level)
    with pytest.raises(ValueError, match="sample=-5: a whole number from 2"):
        silhouette(x, labels, sample=-5)
    with pytest.raises(ValueError, match=r"probs of bool: probs\.astype"):
        neighbor_information(np.eye(4, dtype=bool)[labels], np.zeros((40, 1), dtype=int))


def test_the_interval_is_of_the_level_resamples_and_seed_asked_for():
    truth = np.tile([0, 1], 50)
    labels = np.where(np.arange(100) % 5 == 0, 1 - truth, truth)
    given = dict(level=0.5, resamples=30, seed=2)
    plain = bootstrap(
        (labels, truth), cluster_accuracy, paired=True, vectorized=False, n_resamples=30,
        confidence_level=0.5, method="percentile", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert confidence_interval(labels, truth, **given) == (plain.low, plain.high)


def test_k_means_is_of_the_embeddings_as_it_is_said():
    x = np.random.default_rng(0).normal(size=(200, 4)) * np.linspace(0.1, 5, 200)[:, None] + 1
    for how in ("none", "l2", "center-l2"):
        plain = KMeans(3, n_init=10, random_state=5).fit_predict(normalize(x, how))
        np.testing.assert_array_equal(kmeans(x, 3, how, 5), plain)
