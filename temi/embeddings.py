"""Embeddings as arrays: where they come from, what is wrong with them, how they are prepared."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from temi.data import ImageSet, check_image_set
from temi.files import readable_path

CHUNK = 8192  # rows looked at together
LARGEST = 1e15  # number in an embedding: a row's squares add up in float32, which ends at 3e38


class RowNumbers(Sequence[str]):
    """The numbers from 0 on as texts, made when asked for: ten million would take 700 MB."""

    def __init__(self, count: int):
        self.numbers = range(count)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        chosen = self.numbers[index]
        return tuple(map(str, chosen)) if isinstance(index, slice) else str(chosen)


@dataclass(frozen=True)
class Features:
    """Embeddings and where they come from.

    Attributes
    ----------
    x : ndarray [N, D], floating point
    ids : sequence of str
        Name of each row's image, or its number.
    manifest : dict
        ``dataset``, ``backbone``, and what else is known of the rows' origin.
    labels : ndarray [N], int64, or None
        Class of each row's image. Nothing that trains or chooses reads them: they only score.
    class_names : tuple of str
        Name of each class; empty without labels.
    """

    x: np.ndarray
    ids: Sequence[str]
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
    def from_array(cls, x: np.ndarray, dataset: str = "array") -> "Features":
        """Wrap an array of one's own embeddings, after :func:`temi.embeddings.check_embeddings`."""
        check_embeddings(x)
        manifest = {"dataset": dataset, "backbone": "own", "sha256": checksum(x)}
        return cls(x, RowNumbers(len(x)), manifest)


def as_array(features: "Features | np.ndarray") -> np.ndarray:
    """The rows of ``features``, or the array itself, after :func:`check_embeddings`."""
    x = features.x if isinstance(features, Features) else features
    check_embeddings(x)
    return x


def spaces_of(manifest: dict) -> list[dict]:
    """Manifests of the feature spaces that are joined; ``manifest`` itself where none are."""
    return manifest.get("spaces", [manifest])


def load_features(path: str | Path) -> Features:
    """Read one's own embeddings: what :func:`temi.train` takes when the images stay outside.

    Parameters
    ----------
    path : path
        ``.npy`` with an array [N, D], or ``.npz`` with such an array ``X`` and, if there are
        classes to score with, ``y`` [N] of whole numbers. Looked up in the current folder, then
        below :func:`temi.files.home`.

    Returns
    -------
    Features
        Named after the file; the rows' ids are their numbers.

    Raises
    ------
    ValueError
        If there is no such file, ``X`` is missing, ``y`` does not fit it, or the embeddings are not
        finite rows [N, D].
    """
    file = readable_path(path)
    if not file.is_file():
        raise ValueError(f"dataset={str(path)!r}: there is no such file")
    try:
        if file.suffix.lower() == ".npz":
            with file.open("rb") as content:
                loaded = np.load(content)
                if isinstance(loaded, np.ndarray):
                    raise ValueError("one array, as in a .npy file")
                arrays = {name: loaded[name] for name in ("X", "y") if name in loaded}
                names = loaded.files
        else:
            arrays = {"X": np.load(file, mmap_mode="c")}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"dataset={str(path)!r}: no whole .npy or .npz file ({reason})") from error
    if "X" not in arrays:
        raise ValueError(f"dataset={str(path)!r}: an array X is needed, not {names}")
    x, y = arrays["X"], arrays.get("y")
    features = Features.from_array(x, dataset=str(path))
    if y is None:
        return features
    if y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"dataset={str(path)!r}: y has {y.dtype} {y.shape}; int ({len(x)},) fits")
    classes, labels = np.unique(y, return_inverse=True)
    class_names = tuple(map(str, classes.tolist()))
    return replace(features, labels=labels.astype(np.int64), class_names=class_names)


def check_embeddings(x: np.ndarray) -> None:
    """Raise a ValueError unless ``x`` is a finite floating-point array [N, D] without zero rows.

    The message names the first row that is wrong.
    """
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray | np.matrix):
        raise ValueError(
            f"embeddings of type {type(x).__name__}: a NumPy array [N, D] is needed, as "
            "numpy.asarray makes of tables and tensors"
        )
    if x.ndim != 2:
        raise ValueError(
            f"embeddings of shape {x.shape}: an array of two dimensions [N, D] is needed"
        )
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"embeddings of dtype {x.dtype}: convert them with x.astype('float32')")
    if not len(x):
        raise ValueError(f"embeddings of shape {x.shape}: there are no rows")
    for start in range(0, len(x), CHUNK):  # rows on disk need not fit in memory
        rows = x[start : start + CHUNK]
        size = np.abs(rows).max(axis=1, initial=0).astype(np.float64)
        for wrong, what, remedy in (
            (np.isnan(size), "NaN", "remove the row or recompute it"),
            (np.isinf(size), "infinity", "remove the row or recompute it"),
            (size == 0, "only zeros, which have no direction", "remove the row"),
            (size > LARGEST, f"numbers beyond {LARGEST:.0e}", "scale all rows down"),
            (size < 1 / LARGEST, f"no number above {1 / LARGEST:.0e}", "scale all rows up"),
        ):
            if wrong.any():
                row = start + int(wrong.argmax())
                raise ValueError(f"embeddings: row {row} holds {what}; {remedy}")


def check_images(images: ImageSet | None, features: Features) -> None:
    """Raise a ValueError unless each row of ``features`` has its image, in the same order.

    By their ids; rows that have numbers alone by place. None is no image to check.
    """
    if images is None:
        return
    check_image_set(images)
    if isinstance(features.ids, RowNumbers):  # not as texts, see there
        if len(images) != len(features):
            raise ValueError(
                f"images: {len(images)} of them for {len(features)} embeddings; one each is needed"
            )
        return
    rows = images.rows(features.ids)
    if rows != sorted(rows):
        raise ValueError("images: their order is not that of the embeddings' ids")


def check_same_backbone(manifest: dict, trained: dict) -> None:
    """Raise a ValueError if two manifests differ in weights or preprocessing.

    Where they name none, in the backbone. One's own embeddings may be of any.
    """
    for space, known in zip(spaces_of(manifest), spaces_of(trained), strict=False):
        if "own" in (space.get("backbone", "own"), known.get("backbone", "own")):
            continue
        keys = [key for key in ("weights", "preprocessing") if key in space and key in known]
        for key in keys or ["backbone"]:  # which may be called NAME or NAME@SIZE
            if space[key] != known[key]:
                raise ValueError(
                    f"backbone={space['backbone']!r}: {key} {space[key]!r} here, {known[key]!r} in "
                    "the run; the clusters hold for the latter alone"
                )


def checksum(x: np.ndarray) -> str:
    """SHA-256 of an array's numbers, in hexadecimal, whether they fit in memory or not."""
    digest = hashlib.sha256()
    for start in range(0, len(x), CHUNK):
        digest.update(np.ascontiguousarray(x[start : start + CHUNK]).data)
    return digest.hexdigest()


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
    dtype: str = "float32",
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
        Of the images trained on, from ``principal_axes``: only what lies along them is kept,
        before the length is made 1.
    chunk_size : int
        Rows converted at a time, so that beside the result little memory is needed.
    dtype : {"float32", "float64"}
        Of the computation and the result.

    Returns
    -------
    ndarray [N, D] or [N, P]

    Raises
    ------
    ValueError
        If there is no such ``how``.
    """
    if how not in ("none", "l2", "center-l2"):
        raise ValueError(f"how={how!r}: one of 'none', 'l2', 'center-l2' is allowed")
    if mean is None:
        mean = mean_embedding(x, how)
    prepared = np.empty((len(x), x.shape[1] if axes is None else axes.shape[1]), dtype=dtype)
    for start in range(0, len(x), chunk_size):
        rows = np.asarray(x[start : start + chunk_size], dtype=dtype) - mean
        if axes is not None:
            rows = rows @ axes
        if how != "none":
            length = np.linalg.norm(rows, axis=1, keepdims=True)
            rows = rows / length.clip(min=np.finfo(np.float32).tiny)
        prepared[start : start + chunk_size] = rows
    return prepared
