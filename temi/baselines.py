"""What TEMI is compared with: k-means on the same embeddings."""

import numpy as np

from temi.embeddings import check_embeddings, normalize


def kmeans(x: np.ndarray, num_clusters: int, how: str = "center-l2", seed: int = 0) -> np.ndarray:
    """Cluster embeddings with k-means (scikit-learn, k-means++ starts, best of 10).

    Parameters
    ----------
    x : ndarray [N, D]
        Embeddings.
    num_clusters : int
    how : {"none", "l2", "center-l2"}
        What is done to the embeddings first; see :func:`temi.embeddings.normalize`.
    seed : int

    Returns
    -------
    ndarray [N], int32
        Cluster of each row.

    Raises
    ------
    ValueError
        If ``x`` is not finite rows [N, D] with a direction, there is no such ``how``, or
        scikit-learn refuses the number of clusters.
    """
    from sklearn.cluster import KMeans

    check_embeddings(x)
    model = KMeans(num_clusters, n_init=10, random_state=seed)
    return model.fit_predict(normalize(x, how))
