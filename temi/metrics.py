"""Scores of a clustering, with classes and without.

Those that take classes use them after the fact, to score alone.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import linear_sum_assignment
from scipy.stats import bootstrap, entropy
from sklearn import metrics as sklearn_metrics
from sklearn.metrics.cluster import contingency_matrix

DRAWN = 2**24  # rows of resamples in memory at a time: 128 MiB
SCORES = ("acc", "nmi", "anmi", "ari")


def match_clusters(labels: np.ndarray, classes: np.ndarray) -> dict[int, int]:
    """One-to-one matching of clusters with classes that agrees on the most images.

    Hungarian matching; where there are more clusters than classes (or the other way round) the
    surplus stays unmatched, and its images count as wrong.

    Parameters
    ----------
    labels, classes : array [N] of int, or of texts
        Cluster and class of each image.

    Returns
    -------
    dict
        Cluster -> class, for the clusters that were matched.
    """
    counts = contingency_matrix(classes, labels)  # (classes, clusters)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    class_ids, cluster_ids = np.unique(classes).tolist(), np.unique(labels).tolist()
    return {cluster_ids[c]: class_ids[r] for r, c in zip(rows, columns, strict=True)}


def matched_counts(
    labels: np.ndarray, classes: np.ndarray, *, by_similarity: bool = False
) -> pd.DataFrame:
    """How many images of each class (rows) are in each cluster (columns).

    The clusters stand in the order of the classes that :func:`match_clusters` gives them, so that
    what is right stands on the diagonal; those without a class come last.

    Parameters
    ----------
    labels, classes : array [N] of int
        Cluster and class of each image.
    by_similarity : bool
        Order the classes so that those whose images fall into the same clusters stand side by side
        (leaves of an average-linkage tree, cosine distance between the rows of counts); else they
        keep their numbers' order.

    Returns
    -------
    DataFrame of int, classes by clusters
    """
    counts = pd.crosstab(np.asarray(classes), np.asarray(labels))  # a Series brings an index
    if by_similarity and len(counts) > 2:
        tree = linkage(counts, "average", metric="cosine", optimal_ordering=True)
        counts = counts.iloc[leaves_list(tree)]
    match = match_clusters(labels, classes)
    place = {label: row for row, label in enumerate(counts.index)}
    return counts[sorted(counts.columns, key=lambda c: place.get(match.get(c), np.inf))]


def cluster_accuracy(labels: np.ndarray, classes: np.ndarray) -> float:
    """Share of images whose cluster is matched with their class; see :func:`match_clusters`."""
    counts = contingency_matrix(classes, labels)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))


def purity(labels: np.ndarray, classes: np.ndarray) -> float:
    """Share of images that are of the most frequent class of their cluster.

    The many-to-one accuracy: several clusters may stand for one class, so it is the score to read
    where there are more clusters than classes. It never falls as clusters are split: with one
    image a cluster it is 1. The one-to-one score is the accuracy that :func:`temi.evaluate` gives.

    Parameters
    ----------
    labels, classes : array [N] of int
        Cluster and class of each image.
    """
    return float(contingency_matrix(classes, labels).max(axis=0).sum() / len(labels))


def _right(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Whether each image is in the cluster that :func:`match_clusters` gives its class."""
    match = match_clusters(labels, classes)
    return pd.Series(labels).map(match).to_numpy() == classes


def class_recall(labels: np.ndarray, classes: np.ndarray) -> pd.Series:
    """Share of each class's images that are in the cluster matched with it.

    Parameters
    ----------
    labels, classes : array [N] of int
        Cluster and class of each image.

    Returns
    -------
    Series of float, by class
        0 for a class that :func:`match_clusters` leaves without a cluster.
    """
    return pd.Series(_right(labels, classes)).groupby(np.asarray(classes)).mean()


def coverage_curve(labels: np.ndarray, classes: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """Accuracy of the surest image, of the surest two, and so on to all.

    Parameters
    ----------
    labels, classes : array [N] of int
        Cluster and class of each image, matched once over all images by :func:`match_clusters`.
    sure : array [N] of float
        How sure each label is, such as the agreement of the heads. Images that are equally sure
        count as their mean, so that the order in which they stand does not matter.

    Returns
    -------
    ndarray [N], float64
        The last is the accuracy that :func:`temi.evaluate` gives.

    Raises
    ------
    ValueError
        If ``sure`` is not a number for each image.
    """
    sure = np.asarray(sure, dtype=np.float64)
    if sure.shape != (len(labels),) or np.isnan(sure).any():
        raise ValueError(
            f"sure: shape {sure.shape}, {np.isnan(sure).sum()} of them no number; a number for "
            f"each of the {len(labels)} images is allowed"
        )
    level = pd.Series(_right(labels, classes).astype(float)).groupby(sure).transform("mean")
    surest_first = level.to_numpy()[np.argsort(-sure, kind="stable")]
    return surest_first.cumsum() / np.arange(1, len(labels) + 1)


def confidence_interval(
    labels: np.ndarray,
    classes: np.ndarray,
    score: Callable[[np.ndarray, np.ndarray], float] = cluster_accuracy,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of a score (percentiles, over images drawn with replacement).

    It says how far the score depends on which images were scored; not how far another seed of the
    training would move it, which is often more.

    Parameters
    ----------
    labels, classes : array [N] of int
        Cluster and class of each image.
    score : callable
        (labels, classes) -> float.
    level : float
        Share of resamples inside the interval.
    resamples : int
    seed : int

    Returns
    -------
    tuple of float
        Lower and upper end.

    Raises
    ------
    ValueError
        If ``level`` is no share.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level!r}: a share above 0 and below 1 is allowed")
    result = bootstrap(
        (labels, classes), score, paired=True, vectorized=False, n_resamples=resamples,
        confidence_level=level, method="percentile", rng=np.random.default_rng(seed),
        batch=max(1, DRAWN // len(labels)),
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def stability(clusterings: Sequence[np.ndarray]) -> float:
    """Mean adjusted Rand index between every two clusterings of the same images; no classes.

    Of runs that differ in their seed alone: 1 where all find the same groups, near 0 where they
    have nothing in common.

    Parameters
    ----------
    clusterings : sequence of array [N] of int
        Cluster of each image in each of them; two or more.

    Raises
    ------
    ValueError
        If there are fewer than two.
    """
    if len(clusterings) < 2:
        raise ValueError(f"clusterings: {len(clusterings)} given; two or more can be compared")
    pairs = itertools.combinations(clusterings, 2)
    return float(np.mean([sklearn_metrics.adjusted_rand_score(a, b) for a, b in pairs]))


def silhouette(x: np.ndarray, labels: np.ndarray, sample: int = 2000, seed: int = 0) -> float:
    """Mean silhouette (cosine distance) of a sample of images; no classes.

    How much nearer an image is to its own cluster than to the next, from -1 to 1. The sample keeps
    the cost, quadratic in its size, flat.

    Parameters
    ----------
    x : ndarray [N, D]
        Embeddings.
    labels : array [N] of int
    sample : int
        Images drawn, all if there are fewer.
    seed : int

    Raises
    ------
    ValueError
        If the sample has one cluster alone, or each of its images is one (scikit-learn); or the
        labels are no array: a Series would be read by its index; or ``sample`` is below 2.
    """
    if sample < 2:
        raise ValueError(f"sample={sample!r}: a whole number from 2 is allowed")
    if not isinstance(labels, np.ndarray):
        raise ValueError(
            f"labels of type {type(labels).__name__}: a NumPy array is needed, as numpy.asarray "
            "makes of a Series or a list"
        )
    rows = np.random.default_rng(seed).permutation(len(x))[:sample]
    distances = np.asarray(x[rows], dtype=np.float32)
    return float(sklearn_metrics.silhouette_score(distances, labels[rows], metric="cosine"))


def neighbor_information(probs: np.ndarray, neighbors: np.ndarray) -> float:
    """Mutual information between the clusters of neighbours, in nats; no classes.

    How much the cluster of an image says about the cluster of its neighbour: 0 for clusters that
    ignore the neighbourhoods, or for a single cluster; log K where neighbours always share one of K
    clusters of the same size. Of soft clusters, the joint distribution is the mean of ``p(c|x)
    p(c'|x')`` over the pairs (Ji et al., Invariant Information Clustering, ICCV 2019, eq. 2).

    Parameters
    ----------
    probs : ndarray [N, K] of float, or [N] of int
        Probability of each cluster, as from :meth:`temi.Run.predict_proba`, or the clusters.
    neighbors : ndarray [N, k] of int
        Rows of each image's neighbours, itself left out.

    Returns
    -------
    float
        In nats.

    Raises
    ------
    ValueError
        If ``probs`` are truth values or in half precision.
    """
    if probs.dtype in (bool, np.float16):  # whose sums are none, or lose what they add up
        raise ValueError(f"probs of {probs.dtype}: probs.astype('float32') is needed")
    if probs.ndim == 1:
        partners = probs[neighbors].ravel()
        joint = contingency_matrix(np.repeat(probs, neighbors.shape[1]), partners)
    else:
        joint = sum(probs.T @ probs[column] for column in neighbors.T)
    ends = entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0))
    return float(ends - entropy(joint, axis=None))


def learnability(x: np.ndarray, labels: np.ndarray, folds: int = 5, seed: int = 0) -> float:
    """How well a linear classifier foresees the clusters of images it has not seen; no classes.

    Clusters that the features explain can be learned from a part of the images and told for the
    rest; an arbitrary partition cannot. To choose between settings by this is the proposal of
    TURTLE (Gadetsky, Jiang and Brbić, ICML 2024), with another linear classifier.

    Parameters
    ----------
    x : ndarray [N, D]
        Embeddings, centred and L2-normalised: the ridge penalty of 1 goes with their length.
    labels : array [N] of int
        Cluster of each image, at least two in use.
    folds : int
        Parts of the images, each foreseen by a classifier fitted on the others.
    seed : int
        Of the parts.

    Returns
    -------
    float
        Adjusted Rand index between the clusters and those foreseen: 1 if all are, about 0 for
        chance, whatever the number and the sizes of the clusters.
    """
    from sklearn.linear_model import RidgeClassifier  # takes its time, and only this needs it
    from sklearn.model_selection import KFold, cross_val_predict

    parts = KFold(folds, shuffle=True, random_state=seed)
    foreseen = cross_val_predict(RidgeClassifier(), x, labels, cv=parts)
    return float(sklearn_metrics.adjusted_rand_score(labels, foreseen))


def evaluate(labels: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Score a clustering against the classes.

    Parameters
    ----------
    labels, classes : array [N] of int
        Cluster and class of each image, N at least 1.

    Returns
    -------
    dict
        ``acc``, accuracy after Hungarian matching; ``nmi``, normalised mutual information
        (arithmetic mean); ``anmi``, the same adjusted for chance; ``ari``, adjusted Rand index.
        1 is perfect for all four; chance is near 0 for the last two alone.

    Raises
    ------
    ValueError
        If the two differ in length or are empty, or there are no classes.
    """
    if classes is None:
        raise ValueError("classes=None: without classes there is nothing to score against")
    labels, classes = np.asarray(labels), np.asarray(classes)
    if labels.ndim != 1 or labels.shape != classes.shape or not len(labels):
        raise ValueError(
            f"labels of shape {labels.shape}: one cluster for each of the {len(classes)} classes, "
            "and at least one, is needed"
        )
    return {
        "acc": cluster_accuracy(labels, classes),
        "nmi": float(sklearn_metrics.normalized_mutual_info_score(classes, labels)),
        "anmi": float(sklearn_metrics.adjusted_mutual_info_score(classes, labels)),
        "ari": float(sklearn_metrics.adjusted_rand_score(classes, labels)),
    }


def cluster_statistics(labels: np.ndarray, num_clusters: int) -> dict:
    """How the images are spread over the clusters; no classes needed.

    Parameters
    ----------
    labels : array [N] of int
        Cluster of each image, 0 to ``num_clusters - 1``.
    num_clusters : int

    Returns
    -------
    dict
        ``sizes``, images in each cluster; ``empty_clusters``, how many have none; ``entropy`` of
        the sizes in nats, log K where all are equal; ``balance``, that entropy over log K, 1 where
        K is 1.

    Raises
    ------
    ValueError
        If a label is no cluster.
    """
    sizes = np.bincount(labels, minlength=num_clusters)
    if len(sizes) > num_clusters:
        raise ValueError(f"labels: {len(sizes) - 1} is no cluster of {num_clusters}")
    return {
        "sizes": sizes.tolist(),
        "empty_clusters": int((sizes == 0).sum()),
        "entropy": float(entropy(sizes)),
        "balance": float(entropy(sizes, base=num_clusters)) if num_clusters > 1 else 1.0,
    }
