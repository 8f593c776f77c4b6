"""Choosing without labels: how many clusters the images themselves suggest."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score
from tqdm import tqdm

from temi.checks import is_whole
from temi.embeddings import Features, as_array, mean_embedding, normalize, principal_axes
from temi.metrics import silhouette

CANDIDATES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 125, 150, 200, 250,
              300)  # fmt: skip
DIMENSIONS = 64  # principal components: k-means in more is slower and no steadier
IMAGES = 6000  # drawn of more; two halves of them are clustered
REPEATS = 4


@dataclass(frozen=True)
class SuggestedClusters:
    """A number of clusters and what it rests on.

    Attributes
    ----------
    num_clusters : int
        The candidate of the largest silhouette.
    curve : DataFrame
        One row a candidate: ``num_clusters``; ``silhouette``, mean over the repetitions, and
        ``silhouette_std``; ``stability``, the mean adjusted mutual information (1: the same, 0: as
        by chance) between what two halves of the images say of all of them.
    """

    num_clusters: int
    curve: pd.DataFrame


def default_candidates(count: int) -> list[int]:
    """Numbers of clusters to try with so many images; a ValueError if they are too few for any."""
    found = [clusters for clusters in CANDIDATES if 10 * clusters <= min(count, IMAGES) // 2]
    if not found:
        raise ValueError(f"{count} images are too few to choose by; give num_clusters")
    return found


def suggest_num_clusters(
    features: Features | np.ndarray,
    candidates: Sequence[int] | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> SuggestedClusters:
    """How many clusters images suggest, without labels and before any training.

    Up to 6,000 images drawn at random are split in halves four times; k-means clusters each half
    and assigns all images to its centres. The silhouette (Rousseeuw), which is larger the nearer
    images are to their own centre's crowd than to the next, is largest where clusters are neither
    merged nor cut; that candidate is suggested. The agreement between the two halves (as in Lange
    et al.) is reported beside it: where it is low for all candidates, no number is much better than
    another.

    The suggestion is about crowds in the backbone's space, which need not be the kinds that one has
    in mind: of fine kinds several make one crowd, of a varied kind one makes several.
    ``results/num_clusters.csv`` holds how far off it was on data with known classes. With a kind in
    mind, its number is the better choice; and asking for a few more clusters than kinds costs
    little, as clusters are easily merged afterwards, never split.

    Parameters
    ----------
    features : Features or ndarray [N, D]
    candidates : sequence of int, optional
        None: some twenty numbers from 2 to 300, each about a quarter larger than the one before,
        as far as there are ten images for each cluster of a half.
    seed : int
        Of the drawing and of k-means.
    progress : bool
        Show a progress bar.

    Returns
    -------
    SuggestedClusters

    Raises
    ------
    ValueError
        If a candidate is below 2 or more than a half has images, there are fewer than 40 images to
        choose candidates for, or too many of them are the same.

    References
    ----------
    - Rousseeuw, Silhouettes: a graphical aid to the interpretation and validation of cluster
      analysis, 1987, https://doi.org/10.1016/0377-0427(87)90125-7
    - Lange et al., Stability-based validation of clustering solutions, 2004,
      https://doi.org/10.1162/089976604773717621
    """
    x = as_array(features)
    random = np.random.default_rng(seed)
    rows = np.sort(random.permutation(len(x))[:IMAGES])
    half = len(rows) // 2
    if candidates is None:
        candidates = default_candidates(len(x))
    if not len(candidates):
        raise ValueError("candidates: none; give one or more, or None")
    for clusters in candidates:
        if not is_whole(clusters) or not 2 <= clusters <= half:
            raise ValueError(
                f"candidates: {clusters!r}; whole numbers from 2 to {half} are allowed with "
                f"{len(x)} images"
            )
    x = np.asarray(x[rows], dtype=np.float32)
    mean = mean_embedding(x, "center-l2")
    x = normalize(x, "center-l2", mean, principal_axes(x, mean, DIMENSIONS))
    splits = [random.permutation(len(x)) for _ in range(REPEATS)]
    curve = []
    for clusters in tqdm(
        candidates, desc="numbers of clusters", file=sys.stdout, disable=not progress, delay=2
    ):
        silhouettes, agreements = [], []
        for repeat, order in enumerate(splits):
            said, state = [], (seed + repeat) % 2**32  # the largest that NumPy takes is one less
            for part in (order[:half], order[half:]):
                model = KMeans(clusters, n_init=1, random_state=state).fit(x[part])
                said.append(model.predict(x))
            if min(len(np.unique(labels)) for labels in said) == 1:
                raise ValueError("too many images are the same to choose by; give num_clusters")
            silhouettes += [silhouette(x, labels, seed=seed) for labels in said]
            agreements.append(adjusted_mutual_info_score(*said))
        curve.append(
            {"num_clusters": clusters, "silhouette": np.mean(silhouettes),
             "silhouette_std": np.std(silhouettes), "stability": np.mean(agreements)}
        )  # fmt: skip
    table = pd.DataFrame(curve)
    best = table["num_clusters"][table["silhouette"].argmax()]
    return SuggestedClusters(int(best), table)
