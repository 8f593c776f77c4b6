"""Embeddings of images: computed once, cached with a manifest, never used where they are stale."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections import ChainMap
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from temi.backbones import Backbone, load_backbone, named_size, spaces
from temi.blocks import IDENTITY, Blocks, joined_sizes, kept
from temi.checks import is_whole
from temi.data import ImageSet, check_image_set
from temi.distributed import any_of, from_first, is_first, wait_for_all
from temi.embeddings import Features, normalize
from temi.extraction import ExtractionConfig, check_shape, extract, unreadable_error
from temi.files import (
    check_writable,
    path_part,
    read_json,
    readable_path,
    sha256,
    wait_until,
    writable_path,
    write_json,
    write_whole,
)
from temi.image_files import ImageFiles

ARRAY = "embeddings.npy"
IDS = "ids.json"
MANIFEST = "manifest.json"
UNREADABLE = "unreadable.csv"
DENIED = os.strerror(errno.EACCES)  # as a reason why an image cannot be read


def embed(
    images: ImageSet,
    backbone: str = "pixels",
    *,
    weights: str | Path | None = None,
    image_size: int | None = None,
    data_dir: str | Path = "data",
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int | None = None,
    num_workers: int | None = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    on_error: Literal["skip", "stop"] = "skip",
    force_recompute: bool = False,
    progress: bool = True,
) -> Features:
    """Embed images with a backbone, or read the embeddings from the cache.

    The cache is ``DATA_DIR/embeddings/DATASET/BACKBONE/``: the array, the ids, a table of the
    images that could not be read, and a manifest. One that does not match the images, the backbone,
    its weights, its preprocessing or its own checksum is never used: a warning says what differs,
    and the embeddings are computed anew. An interrupted extraction goes on where it stopped.

    Processes that ``torchrun`` starts share the work: each embeds some blocks of the images, the
    first joins them, and all get the same embeddings. Another number of processes may go on with
    what these leave. :func:`embed_shard` does without ``torchrun``.

    Parameters
    ----------
    images : ImageSet
    backbone : str
        See :func:`temi.load_backbone`. ``"a+b"`` embeds with each, scales both to length 1 and
        joins them: the cosine similarity of the joined rows is the mean of both similarities.
        ``"a@112+a@144"`` is one backbone at two sizes.
    weights, image_size
        See :func:`temi.load_backbone`.
    data_dir : path
        A relative one starts at :func:`temi.files.home`.
    dtype : {"float16", "float32"}
        On disk. Half precision halves the file, and the clusters found agree.
    batch_size : int, optional
        Images decoded and embedded together; None: 512, or on a CPU as few as its caches and
        malloc are fast with (5 of 224 x 224 pixels, 20 of 112 x 112, twice that in bf16). A forward
        pass that does not fit into memory is halved until it does.
    num_workers : int, optional
        Processes that decode; None: as many as there are cores, up to 8 (the processes of
        ``torchrun`` divide the cores); none for ``pixels``, or where the first batches show that
        decoding takes less than a fifth of the time, or on a CPU three quarters.
    device : str
        See :class:`temi.TrainConfig`.
    precision : {"auto", "fp32", "bf16"}
        See :class:`temi.TrainConfig`. With ``"auto"`` a cache made in either is used.
    on_error : {"skip", "stop"}
        An image that cannot be read, or whose embedding is all zeros, is left out, said and
        listed; or it is an error.
    force_recompute : bool
        Compute even where the cache matches.
    progress : bool
        Show a progress bar, with images a second and the time that is left.

    Returns
    -------
    Features
        Rows in the order of the images. Memory-mapped, so that only what is used is read; those of
        several backbones are joined in memory.

    Raises
    ------
    ValueError
        If a name, a size or the weights do not fit, an image cannot be read (with
        ``on_error="stop"``), none can, or an embedding is not finite.
    OSError
        If weights are not there or a download fails; says what to fetch by hand. Or if the images'
        folder goes away meanwhile; what was embedded is kept.
    MemoryError
        If embedding a single image does not fit into the device's memory.
    """
    check_image_set(images)
    config = ExtractionConfig(dtype, batch_size, num_workers, device, precision, on_error, progress)
    parts = []
    side = int(image_size) if is_whole(image_size) else image_size  # NumPy's are no JSON
    asked = {"image_size": side, "weights_file": weights and str(readable_path(weights))}
    asked = {key: value for key, value in asked.items() if value is not None}
    for extractor in _extractors(backbone, weights, side):
        folder = _folder(data_dir, images.name, extractor.name)
        if missing := _fill(images, extractor, folder, config, force_recompute):
            raise OSError(
                f"{folder}: {missing} images that other processes have embedded are not to be seen "
                "here; the same command goes on"
            )
        part = _read(images, folder, config)
        parts.append(replace(part, manifest=part.manifest | asked))
    return parts[0] if len(parts) == 1 else _join(parts, backbone)


def embed_shard(
    images: ImageSet,
    backbone: str = "pixels",
    *,
    shard: str,
    weights: str | Path | None = None,
    image_size: int | None = None,
    data_dir: str | Path = "data",
    force_recompute: bool = False,
    **options,
) -> int:
    """Embed one share of the images, beside jobs that embed the others and know nothing of it.

    For an array of jobs (SLURM's, say) that have ``data_dir`` in common. The job that finds nothing
    missing any more joins all shares into the cache, equal to that of one process; so does a later
    :func:`embed`, which computes what is missing first.

    Parameters
    ----------
    images, backbone, weights, image_size, data_dir
        See :func:`embed`; the same for all shares.
    shard : str
        ``"1/8"`` to ``"8/8"``, of eight shares. One may be computed twice, or in several goes.
    force_recompute : bool
        Compute this share even where it is there, or the whole cache matches.
    **options
        ``dtype``, ``batch_size``, ``num_workers``, ``device``, ``precision``, ``on_error`` and
        ``progress``: see :func:`embed`. Shares fit together where dtype, batch size and precision
        agree, so name the latter two where the jobs' devices or processors differ.

    Returns
    -------
    int
        How many of all images are still missing, of those computed anew with ``force_recompute``;
        0 once the cache is whole.

    Raises
    ------
    ValueError
        As :func:`embed` does; or ``shard`` is none.
    """
    check_image_set(images)
    config = ExtractionConfig(shard=shard, **options)
    missing = 0
    for extractor in _extractors(backbone, weights, image_size):
        folder = _folder(data_dir, images.name, extractor.name)
        missing = max(missing, _fill(images, extractor, folder, config, force_recompute))
    return missing


def _extractors(
    backbone: str, weights: str | Path | None, image_size: int | None
) -> Iterator[Backbone]:
    """The backbones that a name joins, loaded one by one."""
    names = spaces(backbone)
    if weights is not None and len({named_size(name)[0] for name in names}) > 1:
        raise ValueError(f"weights={str(weights)!r}: None is allowed with several backbones")
    if image_size is not None and all(named_size(name)[1] for name in names):
        raise ValueError(f"image_size={image_size}: None is allowed, as {backbone!r} names a size")
    for name in names:
        yield load_backbone(name, weights=weights, image_size=image_size)


def load_cached(manifest: dict, data_dir: str | Path = "data") -> Features:
    """Embeddings that :func:`embed` left in the cache, by their manifest, without the images.

    Parameters
    ----------
    manifest : dict
        The ``manifest`` of what :func:`embed` returned.
    data_dir : path
        As it was given to :func:`embed`.

    Returns
    -------
    Features
        Without labels.

    Raises
    ------
    ValueError
        If they are not there, or are others by now.
    """
    if "spaces" in manifest:
        return _join([load_cached(part, data_dir) for part in manifest["spaces"]],
                     manifest["backbone"])  # fmt: skip
    folder = _folder(data_dir, manifest["dataset"], manifest["backbone"])
    if not (folder / ARRAY).exists() or sha256(folder / ARRAY) != manifest["sha256"]:
        raise ValueError(
            f"data_dir={str(data_dir)!r}: the embeddings of {manifest['dataset']!r} are not in "
            f"{folder}, or are others by now"
        )
    if not (folder / IDS).exists():
        raise ValueError(f"data_dir={str(data_dir)!r}: {folder / IDS} is missing")
    ids = tuple(read_json(folder / IDS))
    return Features(np.load(folder / ARRAY, mmap_mode="c"), ids, manifest)


def _folder(data_dir: str | Path, dataset: str, backbone: str) -> Path:
    """Where the embeddings of a data set by one backbone are cached."""
    return writable_path(data_dir) / "embeddings" / path_part(dataset) / path_part(backbone)


def _fill(
    images: ImageSet, backbone: Backbone, folder: Path, config: ExtractionConfig, force: bool
) -> int:
    """See to it that ``folder`` holds the embeddings by one backbone, as far as the share goes.

    Returns how many of all images are still missing, of other shares.
    """
    names = hashlib.sha256(json.dumps(images.ids).encode()).digest()
    if any_of(names != from_first(lambda: names)):
        raise ValueError(f"dataset={images.name!r}: the processes do not find the same images")
    identity = {
        "dataset": images.name,
        "dataset_fingerprint": from_first(lambda: images.fingerprint),
        "backbone": backbone.name,
        "weights": backbone.weights,
        "preprocessing": backbone.preprocessing,
        "dtype": config.dtype,
    }
    if config.precision != "auto":
        identity["precision"] = config.precision
    difference = from_first(lambda: _difference(images, folder, identity))
    if difference and is_first():
        message = f"{folder} is computed anew: {difference}; another data_dir keeps both"
        warnings.warn(message, stacklevel=3)
    if not (force or difference) and from_first((folder / MANIFEST).exists):
        return 0
    from_first(partial(check_writable, "data_dir", folder))
    blocks = extract(images, backbone, folder, identity, config, force)
    wait_for_all()
    missing = from_first(lambda: _publish(images, folder, blocks, complete=config.shard is None))
    if missing is not None:
        return missing
    if difference := from_first(lambda: _difference(images, folder, identity)):
        raise OSError(f"{folder}: another process has put others there: {difference}")
    return 0


def _publish(images: ImageSet, folder: Path, blocks: Blocks, complete: bool) -> int | None:
    """Turn blocks into a cache if none is missing; may be interrupted and repeated at any point.

    Several processes may do it at the same time, even if one has removed the blocks while another
    reads them: they write the same files, each under a name of its own first. Returns how many
    images are missing, None if another process has joined the blocks. Where they should be
    ``complete``, the file system may take its time to show them.
    """
    if complete:
        wait_until(lambda: blocks.gone or not blocks.missing(blocks.logs()))
    logs = blocks.logs()
    missing = blocks.missing(logs)
    try:
        if not missing:
            _join_blocks(images, folder, blocks, logs)
            return 0
    except FileNotFoundError:
        if not blocks.gone:
            raise
    return None if blocks.gone else missing


def _join_blocks(images: ImageSet, folder: Path, blocks: Blocks, logs: list[dict]) -> None:
    """Write the files of the cache, and remove the blocks."""
    unreadable = {int(row): reason for log in logs for row, reason in log["unreadable"].items()}
    rows = [row for row in range(len(images)) if row not in unreadable]
    if not rows:
        reasons = next(iter(unreadable.values()))
        raise ValueError(f"dataset={images.name!r}: no image can be read (the first: {reasons})")
    ids = [images.ids[row] for row in rows]
    first = [next(row for row in blocks.rows(block) if row not in unreadable)
             for block, log in enumerate(logs) if kept(log)]  # fmt: skip
    for row in first:  # which processes that knew nothing of each other may have decoded
        shape, expected = (logs[r // blocks.size]["shape"] for r in (row, first[0]))
        check_shape(images.ids[row], shape, expected)
    report = {images.ids[row]: reason for row, reason in unreadable.items()}
    parts = blocks.folder.parent
    with tempfile.TemporaryDirectory(dir=parts) as name:
        made = Path(name)
        shape = blocks.join(logs, made / ARRAY)
        write_json(made / IDS, ids)
        table = pd.DataFrame(report.items(), columns=["id", "reason"])
        write_whole(made / UNREADABLE, table.to_csv(index=False))
        versions = {name: version(name) for name in ("temi", "numpy", "pillow", "timm", "torch")}
        manifest = blocks.identity | {"shape": list(shape), "sha256": sha256(made / ARRAY)}
        manifest |= {"batch_size": blocks.batch_size, "forward_sizes": joined_sizes(logs)}
        write_json(made / MANIFEST, manifest | {"unreadable": report, "versions": versions})
        for file in (ARRAY, IDS, UNREADABLE, MANIFEST):
            os.replace(made / file, folder / file)
        blocks.folder.rename(made / "blocks")  # at once, so that nobody takes some for all
    with suppress(OSError):  # another process may be at the same; or some are wanted
        for other in parts.iterdir():
            if not _is_wanted(other, blocks.identity):
                shutil.rmtree(other, ignore_errors=True)
        parts.rmdir()


def _is_wanted(folder: Path, identity: dict) -> bool:
    """Whether it holds blocks of the same images by other settings, which may be gone on with."""
    try:
        other = read_json(folder / IDENTITY)
    except (OSError, ValueError):
        return False
    same_images = other["dataset_fingerprint"] == identity["dataset_fingerprint"]
    settings = ("weights", "preprocessing", "dtype")
    return same_images and any(other[key] != identity[key] for key in settings)


def _read(images: ImageSet, folder: Path, config: ExtractionConfig) -> Features:
    """What the cache in ``folder`` holds, after what is left out has been said."""
    manifest = from_first(lambda: read_json(folder / MANIFEST))
    unreadable = manifest["unreadable"]
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        if config.on_error == "stop":
            raise unreadable_error(name, reason)
        message = f"{len(unreadable)} of {len(images)} images left out, the first, {name}:"
        message += f" {reason}; all are listed in {folder / UNREADABLE}"
        if is_first():
            warnings.warn(message, stacklevel=3)
        images = images.keep([name for name in images.ids if name not in unreadable])
    if not wait_until(lambda: read_json(folder / MANIFEST) == manifest):
        raise OSError(f"{folder}: others than these embeddings were put there meanwhile")
    x = np.load(folder / ARRAY, mmap_mode="c")  # "c": may be written to, which stays in memory
    return Features(x, images.ids, manifest, images.labels, images.class_names)


def _difference(images: ImageSet, folder: Path, wanted: dict[str, str]) -> str:
    """What makes a cache unusable, in words; empty where nothing does, or there is no cache."""
    if not (folder / MANIFEST).exists():
        return ""
    try:
        manifest, ids = read_json(folder / MANIFEST), read_json(folder / IDS)
    except (FileNotFoundError, ValueError) as error:
        return f"a file of it is missing or damaged ({error})"
    if manifest.get("dataset_fingerprint") != wanted["dataset_fingerprint"]:
        before = {*ids, *manifest["unreadable"]}
        new, gone = sorted({*images.ids} - before), sorted(before - {*images.ids})
        listed = [f"{len(ids)} images are {what} ({ids[0]} …)" for what, ids in
                  (("new", new), ("gone", gone)) if ids]  # fmt: skip
        return " and ".join(listed) or "images of the same names have changed"
    denied = [name for name, reason in manifest["unreadable"].items() if reason == DENIED]
    if denied and isinstance(files := images.images, ImageFiles):  # no part of the fingerprint
        for name, row in zip(denied, images.rows(denied), strict=True):
            if files.opens(row):
                return f"images that could not be read can be now ({name} …)"
    for key, value in wanted.items():
        if manifest.get(key) != value:
            return f"{key} was {manifest.get(key)!r}, is {value!r}"
    if not (folder / ARRAY).exists() or sha256(folder / ARRAY) != manifest["sha256"]:
        return f"{ARRAY} is not the file that the manifest describes"
    return ""


def _join(parts: list[Features], backbone: str) -> Features:
    """Several feature spaces side by side, each scaled to length 1, the whole too.

    Of the images that all of them have: a blank one has no direction in some spaces alone.
    """
    manifests = [part.manifest for part in parts]
    manifest: dict[str, Any] = {"dataset": parts[0].dataset, "backbone": backbone}
    manifest["unreadable"] = dict(ChainMap(*(each["unreadable"] for each in manifests)))
    manifest["spaces"] = manifests
    parts = [_without(part, manifest["unreadable"]) for part in parts]
    joined = np.hstack([normalize(part.x, "l2") for part in parts]) / len(parts) ** 0.5
    return replace(parts[0], x=joined.astype(parts[0].x.dtype), manifest=manifest)


def _without(features: Features, ids: Collection[str]) -> Features:
    """The rows that are not of these ids."""
    rows = [row for row, name in enumerate(features.ids) if name not in ids]
    if len(rows) == len(features):
        return features
    labels = None if features.labels is None else features.labels[rows]
    kept = [features.ids[row] for row in rows]
    return replace(features, x=features.x[rows], ids=kept, labels=labels)
