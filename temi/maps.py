"""All images on a plane, similar ones close together."""

import numpy as np
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors


def map_points(x: ArrayLike, *, max_images: int = 10_000, seed: int = 0) -> np.ndarray:
    """Places of images on a plane, by t-SNE.

    Distances within a crowd of points mean something; those between far crowds, and the sizes of
    crowds, do not.

    Parameters
    ----------
    x : ndarray or Tensor [N, D]
        Embeddings, prepared as they were for clustering (:meth:`temi.Run.inputs`).
    max_images : int
        Of more images, so many drawn at random are laid out, which takes about half a minute on
        2 CPU cores; each of the others goes to the middle of its 3 most similar ones among them.
    seed : int
        Of the drawing and of t-SNE.

    Returns
    -------
    ndarray [N, 2], float32
        The first axis has deviation 1. All in one place where fewer than four images are drawn, or
        no two of them differ.

    Raises
    ------
    ValueError
        If ``x`` is anything else, or holds NaN or infinity.

    References
    ----------
    van der Maaten and Hinton, Visualizing Data using t-SNE, 2008,
    https://jmlr.org/papers/v9/vandermaaten08a.html
    """
    x = np.asarray(x)
    if x.ndim != 2 or x.dtype.kind not in "iuf":
        raise ValueError(
            f"x of {x.dtype} {x.shape}: an array [N, D] of numbers is needed, "
            "as run.inputs(features) gives"
        )
    drawn = np.random.default_rng(seed).permutation(len(x))[:max_images]
    drawn.sort()
    few = x[drawn]
    if len(few) < 4 or not np.ptp(few, axis=0).any():
        return np.zeros((len(x), 2), dtype=np.float32)
    if min(few.shape) > 50:  # what its authors do first: faster, and less noise
        few = PCA(50, random_state=seed).fit_transform(few)
    perplexity = min(30, (len(few) - 1) / 3)
    init = "pca" if few.shape[1] > 1 else "random"
    layout = TSNE(init=init, perplexity=perplexity, random_state=seed).fit_transform(few)
    points = layout
    if len(drawn) < len(x):
        near = NearestNeighbors(n_neighbors=3).fit(x[drawn])
        points = layout[near.kneighbors(x, return_distance=False)].mean(axis=1)
        points[drawn] = layout
    return ((points - points.mean(axis=0)) / points[:, 0].std()).astype(np.float32)
