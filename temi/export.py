"""What becomes of the clusters: a table of the images, and a folder for each cluster."""

import errno
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from temi import ensemble
from temi.data import ImageSet, check_image_set
from temi.embeddings import Features, RowNumbers
from temi.files import absolute, expanded, whole_file
from temi.image_files import ImageFiles
from temi.names import apply_names, check_columns, names_in
from temi.rows import Rows
from temi.runs import Run

MARKER = ".sorted-by-temi"  # in a folder that the next call may replace


def assignments(
    run: Run, features: Features | np.ndarray, centers: np.ndarray | None = None
) -> pd.DataFrame:
    """The cluster of each image, and how sure it is.

    Parameters
    ----------
    run : Run
    features : Features or ndarray [N, D]
        From the same backbone as those trained on, not normalised.
    centers : ndarray [K, D], optional
        From :func:`centers`, of the features trained on; needed for new images. None: of
        ``features``.

    Returns
    -------
    DataFrame
        One row an image, in their order:

        - ``path`` : its name in ``features.ids``; its number, in an array;
        - ``cluster`` : int64, majority vote of the heads, as :meth:`temi.Run.predict` has it;
        - ``confidence`` : mean over the aligned heads of the teacher's probability of that cluster;
        - ``agreement`` : share of heads that voted for it;
        - ``second_choice`` : int64, of the other clusters the one of the largest mean probability;
          -1 if there is no other;
        - ``distance`` : 1 minus the cosine similarity to the cluster's centre, 0 to 2; NaN where no
          image trained on is in that cluster.

    Raises
    ------
    ValueError
        Before any head is asked: ``features`` are not of the run's backbone, or ``centers`` not of
        the run.

    Notes
    -----
    Embeddings need not fit in memory: they are prepared, and the N x K probabilities held, for some
    thousand images at a time.
    """
    rows = run.input_rows(features)
    ids = features.ids if isinstance(features, Features) else RowNumbers(len(rows))
    shape = (run.config.num_clusters, rows.shape[1])
    if centers is not None and np.shape(centers) != shape:
        raise ValueError(
            f"centers of shape {np.shape(centers)}: {shape} is allowed, as temi.centers gives "
            "of the features trained on"
        )
    labels, agreement = run.vote(rows)
    if centers is None:
        centers = cluster_means(rows, labels, run.config.num_clusters)
    chunks, clusters, start = [], torch.from_numpy(labels), 0
    for probs in run.mean_probs(rows):
        own = clusters[start : start + len(probs)]
        start += len(probs)
        confidence = probs.gather(1, own[:, None])[:, 0]
        others = probs.scatter(1, own[:, None], -1)  # (chunk, K)
        likeliest, second = others.max(dim=1)
        second = second.where(likeliest >= 0, -1)
        chunks.append((confidence.double().numpy(), second.numpy()))
    confidence, second = map(np.concatenate, zip(*chunks, strict=True))
    return pd.DataFrame(
        {"path": ids, "cluster": labels, "confidence": confidence, "agreement": agreement,
         "second_choice": second, "distance": _distances(rows, labels, centers)}
    )  # fmt: skip


def _distances(rows: Rows, labels: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """One minus the cosine similarity of each row to its cluster's centre."""
    middles, own = torch.tensor(centers), torch.from_numpy(labels).split(ensemble.CHUNK)
    chunks = [
        1 - F.cosine_similarity(part.double(), middles[clusters], dim=1)
        for part, clusters in zip(rows.split(ensemble.CHUNK), own, strict=True)
    ]
    return np.concatenate(chunks)


def centers(run: Run, features: Features | np.ndarray) -> np.ndarray:
    """Mean of each cluster's embeddings, as the heads see them: centred, scaled, projected.

    Parameters
    ----------
    run : Run
    features : Features or ndarray [N, D]
        Those trained on.

    Returns
    -------
    ndarray [K, D] or [K, P], float64
        NaN for a cluster without images.
    """
    rows = run.input_rows(features)
    return cluster_means(rows, run.predict(rows), run.config.num_clusters)


def cluster_means(x: Tensor | Rows, labels: np.ndarray, num_clusters: int) -> np.ndarray:
    """Mean [K, D], float64, of each cluster's rows [N, D]; NaN for a cluster without any."""
    sums = torch.zeros(num_clusters, x.shape[1], dtype=torch.float64)
    clusters = torch.from_numpy(labels).split(ensemble.CHUNK)
    for part, own in zip(x.split(ensemble.CHUNK), clusters, strict=True):
        sums.index_add_(0, own, part.double())
    sizes = np.bincount(labels, minlength=len(sums))[:, None]
    return np.divide(sums.numpy(), sizes, out=np.full(sums.shape, np.nan), where=sizes > 0)


def write_assignments(table: pd.DataFrame, folder: str | Path) -> None:
    """Write ``assignments.csv`` (UTF-8) and ``assignments.parquet``, each whole or not at all.

    Names are written as they are. A spreadsheet may take one that begins with ``=`` for a formula.

    Parameters
    ----------
    table : DataFrame
        From :func:`assignments` or :func:`apply_names`.
    folder : path
        Made where it is missing.

    Raises
    ------
    OSError
        If a file cannot be written: what stood there before is as it was.
    """
    folder = expanded(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "assignments.csv") as file:
        table.to_csv(file, index=False, encoding="utf-8", lineterminator="\n")
    with whole_file(folder / "assignments.parquet") as file:
        table.to_parquet(file, index=False)


def sort_images(
    table: pd.DataFrame,
    images: ImageSet,
    folder: str | Path,
    how: str = "copy",
    names: str | Path | Mapping | None = None,
) -> None:
    """Fill a folder with one sub-folder for each cluster; the originals are left as they are.

    A sub-folder is called by the cluster's number and, where it has one, name: ``03-black-cats``.
    In it the images keep their paths below the folder that they come from, so that two of one name
    stay apart. Images that are no files, such as the digits, become PNG files named by their ids.

    Parameters
    ----------
    table : DataFrame
        From :func:`assignments` or :func:`temi.apply_names`.
    images : ImageSet
        Holds at least the images of the table.
    folder : path
        Must not exist, be empty, or be of an earlier call: that is replaced as a whole, with
        whatever was put or changed in it since.
    how : {"copy", "hardlink", "symlink"}
        Hard links take no space, but whoever edits one edits the original; symbolic links lead
        nowhere once the originals are moved.
    names : path or mapping, optional
        A gallery's "Download names"; None: names that the table brings along.

    Raises
    ------
    ValueError
        In one line, before anything is written: a table without clusters; a folder that holds
        something else, that contains the originals or lies among them; an unknown ``how``;
        malformed names.
    OSError
        If an image cannot be read or a file not be written: what stood at ``folder`` before is as
        it was, and nothing else is left.
    """
    check_columns(table, "path", "cluster")
    if not len(table):
        raise ValueError("table: no rows; a table of one image or more is needed")
    check_image_set(images)
    check_sortable(images, how)
    files = images.images if isinstance(images.images, ImageFiles) else None
    if names is not None:
        table = apply_names(table, names)
    folder = absolute(expanded(folder))
    check_replaceable(folder)
    part, old = _beside(folder)
    if files is not None:
        _check_apart(folder, Path(files.root))
    rows, clusters = images.rows(table["path"]), table["cluster"].tolist()
    places = _folder_names(clusters, names_in(table))
    below = [f"{name}.png" for name in images.ids] if files is None else files.names
    targets = [_below(part / places[c], below[row]) for c, row in zip(clusters, rows, strict=True)]
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        (part / MARKER).touch()
        work = zip(rows, targets, strict=True)
        for row, target in tqdm(work, "sorting", len(rows), unit="image", file=sys.stdout, delay=2):
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(target):  # where upper and lower case are one
                raise FileExistsError(errno.EEXIST, "two images of one name", str(target))
            if files is None:
                Image.fromarray(images.images[row]).save(target)
            else:
                _place(os.path.join(files.root, files.names[row]), target, how, folder.resolve())
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except OSError as error:
        reason = f"{error.strerror or error}; nothing of it was left, {folder} is as it was"
        raise OSError(error.errno, reason, error.filename) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where a new content grows, and where the old one goes until that is there."""
    return folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")


def check_sortable(images: ImageSet, how: str) -> None:
    """Raise a ValueError if images cannot be put into folders in this way."""
    if how not in ("copy", "hardlink", "symlink"):
        raise ValueError(f"how={how!r}: one of 'copy', 'hardlink', 'symlink' is allowed")
    if how != "copy" and not isinstance(images.images, ImageFiles):
        raise ValueError(f"how={how!r}: {images.name!r} holds no files to link to; give 'copy'")


def check_replaceable(folder: Path) -> None:
    """Raise a ValueError if :func:`sort_images` would lose what stands at ``folder``."""
    for place in (folder, *_beside(folder)):
        is_folder = place.is_dir() and not place.is_symlink()
        if os.path.lexists(place) and not is_folder:
            raise ValueError(f"folder={str(folder)!r}: {place} is no folder; give another one")
        if is_folder and not (place / MARKER).exists() and any(place.iterdir()):
            raise ValueError(
                f"folder={str(folder)!r}: {place} holds files that sort_images did not write; "
                "give a new or empty one"
            )


def _check_apart(folder: Path, root: Path) -> None:
    """A ValueError if one contains the other: copies would be clustered, or originals replaced."""
    target, source = folder.resolve(), root.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ValueError(
            f"folder={str(folder)!r}: one outside of the images' own folder {str(root)!r}, "
            "which does not contain that either, is allowed"
        )


def _folder_names(clusters: list[int], names: dict[int, str]) -> dict[int, str]:
    """``03`` or ``03-black-cats``: numbers of equal width, and names without what paths forbid."""
    width = len(str(max(clusters, default=0)))
    found = {}
    for cluster in set(clusters):
        safe = re.sub(r"[^\w]+", "-", names.get(cluster, "")).strip("-")[:50]
        found[cluster] = f"{cluster:0{width}d}-{safe}".rstrip("-")
    return found


def _below(folder: Path, name: str) -> Path:
    """The path of ``name`` in ``folder``; a ValueError if it leads out of it."""
    inside = Path(os.path.normpath(name))
    if inside.anchor or inside.parts[:1] in ((), (os.pardir,)):
        raise ValueError(f"images: {name!r} leads out of the folder")
    return folder / inside


def _place(source: str, target: Path, how: str, replaced: Path) -> None:
    original = os.path.realpath(source)
    if not os.path.isfile(original):
        raise FileNotFoundError(errno.ENOENT, "no such image file any more", source)
    if Path(original).is_relative_to(replaced):  # through a link among the originals
        raise OSError(errno.EINVAL, "lies in the folder that is to be replaced", source)
    if how == "copy":
        shutil.copy2(original, target)
    elif how == "symlink":
        target.symlink_to(original)
    else:
        try:
            os.link(original, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            reason = "no hard links between file systems, give how='copy' or 'symlink'"
            raise OSError(error.errno, reason, source) from error
