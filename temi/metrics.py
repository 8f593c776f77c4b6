"""Scores of a clustering. Those that take classes use them after the fact, to score alone."""

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from scipy.stats import entropy
from sklearn import metrics as sklearn_metrics
from sklearn.metrics.cluster import contingency_matrix

SCORES = ("acc", "nmi", "anmi", "ari")


def match_clusters(labels: np.ndarray, classes: np.ndarray) -> dict[int, int]:
    """One-to-one matching of clusters with classes that agrees on the most images.

    Hungarian matching; where there are more clusters than classes (or the other way round) the
    surplus stays unmatched, and its images count as wrong.

    Parameters
    ----------
    labels, classes : array [N] of int
        Cluster and class of each image.

    Returns
    -------
    dict
        Cluster -> class, for the clusters that were matched.
    """
    counts = contingency_matrix(classes, labels)  # (classes, clusters)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    class_ids, cluster_ids = np.unique(classes), np.unique(labels)
    return {int(cluster_ids[c]): int(class_ids[r]) for r, c in zip(rows, columns, strict=True)}


def matched_counts(labels: np.ndarray, classes: np.ndarray) -> pd.DataFrame:
    """How many images of each class (rows) are in each cluster (columns).

    The clusters stand in the order of the classes that :func:`match_clusters` gives them, so that
    what is right stands on the diagonal; those without a class come last.
    """
    counts = pd.crosstab(classes, labels)
    match = match_clusters(labels, classes)
    return counts[sorted(counts.columns, key=lambda c: match.get(c, np.inf))]


def cluster_accuracy(labels: np.ndarray, classes: np.ndarray) -> float:
    """Share of images whose cluster is matched with their class; see :func:`match_clusters`."""
    counts = contingency_matrix(classes, labels)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels))


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
        If the two differ in length or are empty.
    """
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
        the sizes in nats, log K where all are equal; ``balance``, that entropy over log K.
    """
    sizes = np.bincount(labels, minlength=num_clusters)
    return {
        "sizes": sizes.tolist(),
        "empty_clusters": int((sizes == 0).sum()),
        "entropy": float(entropy(sizes)),
        "balance": float(entropy(sizes, base=num_clusters)),
    }
