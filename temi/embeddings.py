"""Embeddings of images: computed once, cached with a manifest, checked and normalised."""

import hashlib
import json
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from boltons.fileutils import atomic_save

from temi.backbones import Backbone, load_backbone
from temi.data import ImageSet
from temi.files import home, path_part, sha256, write_json


@dataclass(frozen=True)
class Features:
    """Embeddings and where they come from.

    Attributes
    ----------
    x : ndarray [N, D], floating point
    ids : tuple of str
        Name of each row's image.
    manifest : dict
        ``dataset``, ``backbone``, and what else is known of the rows' origin.
    labels : ndarray [N], int64, or None
        Class of each row's image. Nothing that trains or chooses reads them: they only score.
    class_names : tuple of str
        Name of each class; empty without labels.
    """

    x: np.ndarray
    ids: tuple[str, ...]
    manifest: dict
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None without labels."""
        return len(self.class_names) or None

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.manifest["dataset"]

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return self.manifest["backbone"]

    @classmethod
    def from_array(cls, x: np.ndarray) -> "Features":
        """Wrap an array of one's own embeddings, after :func:`check_embeddings`."""
        check_embeddings(x)
        checksum = hashlib.sha256(np.ascontiguousarray(x)).hexdigest()
        manifest = {"dataset": "array", "backbone": "own", "sha256": checksum}
        return cls(x, tuple(map(str, range(len(x)))), manifest)


def as_array(features: "Features | np.ndarray") -> np.ndarray:
    """The rows of ``features``, or the array itself, after :func:`check_embeddings`."""
    x = features.x if isinstance(features, Features) else features
    check_embeddings(x)
    return x


def embed(
    images: ImageSet,
    backbone: str = "pixels",
    *,
    data_dir: str | Path = "data",
    force_recompute: bool = False,
) -> Features:
    """Embed images with a backbone, or read the embeddings from the cache.

    The cache is ``DATA_DIR/embeddings/DATASET/BACKBONE/``: the array, the ids and a manifest. One
    that does not match the images, the backbone or its own checksum is never used: a warning says
    what differs, and the embeddings are computed anew.

    Parameters
    ----------
    images : ImageSet
    backbone : str
        See :func:`temi.load_backbone`.
    data_dir : path
        A relative one starts at :func:`temi.files.home`.
    force_recompute : bool
        Compute even where the cache matches.

    Returns
    -------
    Features
        float32 [N, D], rows in the order of the images.
    """
    extractor = load_backbone(backbone)
    folder = home() / data_dir / "embeddings" / path_part(images.name) / path_part(backbone)
    array_file, manifest_file = folder / "embeddings.npy", folder / "manifest.json"
    wanted = _identity(images, extractor)
    difference = "force_recompute=True"
    if not force_recompute and manifest_file.exists():
        difference = _difference(folder, wanted)
        if difference:
            warnings.warn(f"{folder} is computed anew: {difference}", stacklevel=2)
    if difference or not manifest_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        x = extractor.extract(images.images)
        check_embeddings(x)
        with atomic_save(array_file, overwrite_part=True) as file:
            np.save(file, x)
        write_json(folder / "ids.json", images.ids)
        made = {"dtype": str(x.dtype), "shape": x.shape, "sha256": sha256(array_file)}
        versions = {name: version(name) for name in ("temi", "numpy", "torch")}
        write_json(manifest_file, {**wanted, **made, "versions": versions})
    manifest = json.loads(manifest_file.read_text())
    return Features(np.load(array_file), images.ids, manifest, images.labels, images.class_names)


def _identity(images: ImageSet, backbone: Backbone) -> dict[str, str]:
    """What the embeddings depend on."""
    return {
        "dataset": images.name,
        "dataset_fingerprint": images.fingerprint,
        "backbone": backbone.name,
        "preprocessing": backbone.preprocessing,
    }


def _difference(folder: Path, wanted: dict[str, str]) -> str:
    """What makes a cache unusable, in words; empty where nothing does."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, value in wanted.items():
        if manifest.get(key) != value:
            return f"{key} was {manifest.get(key)!r}, is {value!r}"
    array_file = folder / "embeddings.npy"
    if not array_file.exists() or sha256(array_file) != manifest["sha256"]:
        return "embeddings.npy is not the file that the manifest describes"
    return ""


def check_embeddings(x: np.ndarray) -> None:
    """Raise a ValueError unless ``x`` is a finite floating-point array [N, D] without zero rows.

    The message names the first row that is wrong.
    """
    if not isinstance(x, np.ndarray) or x.ndim != 2:
        shape = getattr(x, "shape", None)
        raise ValueError(
            f"embeddings of shape {shape}: an array of two dimensions [N, D] is needed"
        )
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"embeddings of dtype {x.dtype}: convert them with x.astype('float32')")
    for wrong, what, remedy in (
        (np.isnan(x).any(axis=1), "NaN", "remove the row or recompute it"),
        (np.isinf(x).any(axis=1), "infinity", "remove the row or recompute it"),
        (~x.any(axis=1), "only zeros, which have no direction", "remove the row"),
    ):
        if wrong.any():
            raise ValueError(f"embeddings: row {int(wrong.argmax())} holds {what}; {remedy}")


def mean_embedding(x: np.ndarray, how: str) -> np.ndarray:
    """What :func:`normalize` subtracts: the mean [D] in float32 for "center-l2", else zeros."""
    if how == "center-l2":
        return x.mean(axis=0, dtype=np.float64).astype(np.float32)
    return np.zeros(x.shape[1], dtype=np.float32)


def principal_axes(
    x: np.ndarray, mean: np.ndarray, dim: int, chunk_size: int = 8192
) -> np.ndarray | None:
    """Directions [D, dim] in which embeddings differ the most, the first the most of all.

    The eigenvectors of the covariance, which is summed over ``chunk_size`` rows at a time: rows on
    disk need not fit in memory.

    Parameters
    ----------
    x : ndarray [N, D]
    mean : ndarray [D]
        Subtracted first.
    dim : int
        None is returned where this is D or more: there is nothing to leave out.
    chunk_size : int

    Returns
    -------
    ndarray [D, dim], float32, or None
        Orthonormal columns.
    """
    if dim >= x.shape[1]:
        return None
    covariance = np.zeros((x.shape[1], x.shape[1]), dtype=np.float32)
    for start in range(0, len(x), chunk_size):
        rows = x[start : start + chunk_size].astype(np.float32) - mean
        covariance += rows.T @ rows
    _, vectors = np.linalg.eigh(covariance)  # ascending
    return np.ascontiguousarray(vectors[:, : -dim - 1 : -1])


def normalize(
    x: np.ndarray,
    how: str,
    mean: np.ndarray | None = None,
    axes: np.ndarray | None = None,
    chunk_size: int = 8192,
) -> np.ndarray:
    """Prepare embeddings for clustering.

    Parameters
    ----------
    x : ndarray [N, D]
    how : {"none", "l2", "center-l2"}
        As they are; scaled to length 1; the mean subtracted, then scaled to length 1.
    mean : ndarray [D], optional
        Mean of the images trained on, for new images; that of ``x`` when None.
    axes : ndarray [D, P], optional
        Of the images trained on, from :func:`principal_axes`: only what lies along them is kept,
        before the length is made 1.
    chunk_size : int
        Rows converted at a time, so that beside the result little memory is needed.

    Returns
    -------
    ndarray [N, D] or [N, P], float32
    """
    if mean is None:
        mean = mean_embedding(x, how)
    prepared = np.empty((len(x), x.shape[1] if axes is None else axes.shape[1]), dtype=np.float32)
    for start in range(0, len(x), chunk_size):
        rows = np.asarray(x[start : start + chunk_size], dtype=np.float32) - mean
        if axes is not None:
            rows = rows @ axes
        if how != "none":
            length = np.linalg.norm(rows, axis=1, keepdims=True)
            rows = rows / length.clip(min=np.finfo(np.float32).tiny)
        prepared[start : start + chunk_size] = rows
    return prepared
