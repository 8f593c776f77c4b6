"""A trained run asked about images that it has never seen."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from temi.backbones import load_backbone
from temi.cache import embed, load_cached
from temi.data import ImageSet, load_images
from temi.embeddings import Features, check_same_backbone, spaces_of
from temi.export import assignments, cluster_means
from temi.neighbors import nearest_similarities
from temi.rows import Rows
from temi.runs import Run

NEIGHBORS = 5  # whose mean similarity says how far an image is from those trained on
ORDINARY = 0.99  # share of the images trained on that would not be called outliers
SAMPLE = 2000  # images trained on that this is measured with


def predict_images(
    run: Run,
    images: ImageSet | str | Path,
    *,
    split: str | None = None,
    weights: str | Path | None = None,
    data_dir: str | Path = "data",
    device: str = "auto",
    on_error: Literal["skip", "stop"] = "skip",
    progress: bool = True,
) -> pd.DataFrame:
    """Clusters of new images, embedded as the images of the run were.

    That is by the same weights and preprocessing; the precision of the products is this device's.

    Parameters
    ----------
    run : Run
        Trained on what :func:`temi.embed` gave.
    images : ImageSet, or path or name
        Given as a path or name: see :func:`temi.load_images`, for ``split`` too, which an
        ``ImageSet`` has chosen already.
    weights : path, optional
        Where the backbone's weights are now; None: where they were. They must be the same ones.
    data_dir : path
        Where the new embeddings are cached, and those of the run are looked for.
    device, on_error, progress
        See :func:`temi.embed`.

    Returns
    -------
    DataFrame
        One row an image that could be read: the columns of :func:`temi.assignments`, its
        distances from the centres that the images trained on have; ``similarity``, the mean cosine
        similarity to the 5 most similar of the images trained on; and ``outlier``, True where that
        is lower than for 99 in 100 of the images trained on (among the others of them, on a
        sample of 2,000): so of images of the same kind about one in a hundred is called an outlier.
        Where the run's embeddings are no longer in the cache a warning says so, and distance,
        similarity and outlier are missing.

    Raises
    ------
    ValueError
        Before anything is embedded: the run was trained on an array of one's own, the backbone's
        weights or preprocessing are not those of the run, or ``split`` comes with an ``ImageSet``.
    OSError
        If the images or the weights cannot be read.
    """
    manifest = run.manifest
    spaces = spaces_of(manifest)
    if "preprocessing" not in spaces[0]:
        raise ValueError(
            f"this run was trained on embeddings from {manifest['dataset']!r}, whose backbone temi "
            "does not know: embed the new images in the same way and give predict() the array"
        )
    if isinstance(images, ImageSet):
        if split is not None:
            raise ValueError(f"split={split!r}: images that are loaded already take none")
    else:
        images = load_images(images, split=split, data_dir=data_dir)
    if images.name == manifest["dataset"]:
        fingerprint = images.fingerprint
        if fingerprint != spaces[0]["dataset_fingerprint"]:
            # the same folder, with others in it: the run's embeddings are to stay
            images = replace(images, name=f"{images.name} ({fingerprint[:8]})")
    size = spaces[0].get("image_size")
    weights = weights or spaces[0].get("weights_file")
    for space in spaces:
        backbone = load_backbone(space["backbone"], weights=weights, image_size=size)
        here = {"weights": backbone.weights, "preprocessing": backbone.preprocessing}
        check_same_backbone({"backbone": space["backbone"]} | here, space)
    features = embed(
        images, manifest["backbone"], weights=weights, image_size=size, data_dir=data_dir,
        dtype=spaces[0]["dtype"], device=device, on_error=on_error, progress=progress,
    )  # fmt: skip
    try:
        trained = load_cached(manifest, data_dir)
        if len(trained) != len(run.labels):
            raise ValueError(f"the run was trained on {len(run.labels)} of {len(trained)} rows")
    except ValueError as error:
        warnings.warn(f"distance, similarity and outlier are left out: {error}", stacklevel=2)
        table = assignments(run, features)
        return table.assign(distance=np.nan, similarity=np.nan, outlier=pd.NA)
    known = run.input_rows(trained)  # (N, D)
    centers = cluster_means(known, run.labels, run.config.num_clusters)
    table = assignments(run, features, centers)
    return table.assign(**_novelty(run, features, known))


def _novelty(run: Run, features: Features, known: Rows) -> dict[str, np.ndarray]:
    """Columns that say how far images are from those trained on, [N, D] as the heads see them."""
    k = min(NEIGHBORS, len(known) - 1)
    similarity = nearest_similarities(run.input_rows(features), known, k).mean(dim=1).numpy()
    rows = torch.linspace(0, len(known) - 1, min(SAMPLE, len(known)), dtype=torch.float64).long()
    among = nearest_similarities(known[rows], known, k + 1)[:, 1:].mean(dim=1)  # without itself
    usual = float(torch.quantile(among, 1 - ORDINARY))
    return {"similarity": similarity, "outlier": similarity < usual}
