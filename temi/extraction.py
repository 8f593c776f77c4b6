"""From images to a file of embeddings: decoding, batches, and going on after an interruption."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from temi.backbones import Backbone, stack
from temi.checks import check_types
from temi.config import Device, Precision
from temi.data import ImageSet, UnreadableImageError
from temi.devices import (
    check_precision,
    half_precision,
    is_out_of_memory,
    resolve_device,
    uses_bf16,
)
from temi.files import whole_file, write_json

PROGRESS = "progress.json"
BLANK = "its embedding is all zeros, which has no direction"
SAVE_SECONDS = 10.0  # what a killed extraction loses at most
SAVE_BYTES = 2**25  # what waits in memory to be written at most
PART = "embeddings.part.npy"
# Of one image side times the other, in a forward pass on a CPU: what it makes then stays within the
# caches, and within what malloc reuses instead of asking the system for fresh pages. Up to four
# times faster than 64 images of 224 x 224 (benchmarks/embedding.py).
CPU_PASS_PIXELS = {"fp32": 2**18, "bf16": 2**19}


@dataclass(frozen=True)
class ExtractionConfig:
    """How embeddings are computed; all of it is described at :func:`temi.embed`.

    Raises
    ------
    ValueError
        One line that names the setting, its value and what is allowed.
    """

    dtype: Annotated[
        Literal["float16", "float32"], Field(description="of the embeddings on disk")
    ] = "float16"
    batch_size: Annotated[
        int | None, Field(description="images embedded together; None: what is fast here", ge=1)
    ] = None
    num_workers: Annotated[
        int | None, Field(description="processes that decode; None: as many as help", ge=0)
    ] = None
    device: Device = "auto"
    precision: Precision = "auto"
    on_error: Annotated[
        Literal["skip", "stop"],
        Field(description="leave images out that cannot be read, and list them, or stop"),
    ] = "skip"
    progress: bool = True

    def __post_init__(self):
        check_types(self)
        check_precision(self.precision, resolve_device(self.device))


def extract(
    images: ImageSet, backbone: Backbone, folder: Path, identity: dict, config: ExtractionConfig
) -> dict:
    """Embed all images into ``folder/embeddings.part.npy``, or go on where that was stopped.

    Every ten seconds, and when it is interrupted, what has been computed is flushed to disk, and
    then ``progress.json`` says how far it goes. An extraction that is continued repeats the batches
    of the interrupted one and so gives the same file, to the bit, on the same machine.

    Parameters
    ----------
    images : ImageSet
    backbone : Backbone
    folder : Path
        Exists.
    identity : dict
        What the embeddings depend on; an interrupted extraction of another identity is discarded.
    config : ExtractionConfig

    Returns
    -------
    dict
        What ``progress.json`` holds: ``identity``; ``precision``; ``batch_size``; ``rows``, how
        many are done; ``forward_sizes``, pairs of a row and the images in a forward pass from it
        on, less than a batch where memory was short; ``unreadable``, row -> reason; ``dim``.
    """
    device = resolve_device(config.device)
    precision = "bf16" if uses_bf16(config.precision, device) else "fp32"
    part, log_file = folder / PART, folder / PROGRESS
    log: dict[str, Any] = {}
    if log_file.exists() and part.exists():
        log = json.loads(log_file.read_text())
    same = log.get("identity") == identity and log["precision"] == precision
    if not same or config.batch_size not in (None, log["batch_size"]):
        part.unlink(missing_ok=True)
        size = config.batch_size or default_batch_size(backbone, device, precision)
        log = {"identity": identity, "batch_size": size, "rows": 0}
        log |= {"forward_sizes": [[0, size]], "unreadable": {}, "precision": precision}
    model = backbone.model.to(device)
    model.to(memory_format=torch.channels_last)
    workers = config.num_workers
    if workers is None and backbone.name == "pixels":
        workers = 0
    source = _Batches(images, backbone, log["batch_size"], log["rows"])
    batches = _decoded(source, workers, pin_memory=device.type == "cuda")
    bar = tqdm(
        total=len(images), initial=log["rows"], desc=f"embedding with {backbone.name}",
        unit="image", file=sys.stdout, disable=not config.progress, delay=2, mininterval=1,
    )  # fmt: skip
    pending, saved, shape = [], time.monotonic(), None
    try:
        for start, pixels, rows, unreadable in batches:
            done = len(rows) + len(unreadable)
            if rows:
                shape = shape or pixels.shape[1:]
                stack([pixels[0].numpy()], [images.ids[rows[0]]], shape)  # the same in all batches
                x = _forward(model, pixels, log["forward_sizes"], start, precision, device)
                x = _as_dtype(x, config.dtype, images.ids, rows)
                blank = ~x.any(axis=1)  # no direction, so no neighbours
                unreadable |= {rows[i]: BLANK for i in np.flatnonzero(blank)}
                rows, x = [row for row in rows if row not in unreadable], x[~blank]
                log["dim"] = x.shape[1]
                pending.append((rows, x))
            if unreadable and config.on_error == "stop":
                row, reason = next(iter(unreadable.items()))
                raise unreadable_error(images.ids[row], reason)
            log["unreadable"] |= {str(row): reason for row, reason in unreadable.items()}
            log["rows"] = min(start + log["batch_size"], len(images))
            bar.update(done)
            waiting = sum(x.nbytes for _, x in pending)
            if time.monotonic() - saved > SAVE_SECONDS or waiting > SAVE_BYTES:
                _save(part, log_file, log, pending, len(images))
                pending, saved = [], time.monotonic()
    finally:
        bar.close()
        _save(part, log_file, log, pending, len(images))
    return log


class _Batches(Dataset):
    """Batches of decoded images from a row on; an item is one batch, made in a worker process."""

    def __init__(self, images: ImageSet, backbone: Backbone, batch_size: int, first_row: int):
        self.images, self.prepare = images, backbone.prepare
        self.starts = range(first_row, len(images), batch_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[int, Tensor, list[int], dict[int, str]]:
        start = self.starts[index]
        pictures, rows, unreadable = [], [], {}
        for row in range(start, min(start + self.batch_size, len(self.images))):
            try:
                pictures.append(self.prepare(self.images.images[row]))
                rows.append(row)
            except UnreadableImageError as error:
                unreadable[row] = error.reason
        names = [self.images.ids[row] for row in rows]
        pixels = stack(pictures, names) if pictures else np.empty(0, dtype=np.uint8)
        return start, torch.from_numpy(pixels), rows, unreadable


def default_batch_size(backbone: Backbone, device: torch.device, precision: str) -> int:
    """Images decoded and embedded together where the caller leaves it open."""
    if device.type != "cpu":
        return 512
    height, width = backbone.prepare(np.zeros((1, 1), dtype=np.uint8)).shape[:2]
    return min(64, max(1, CPU_PASS_PIXELS[precision] // (height * width)))


def _decoded(source: _Batches, workers: int | None, pin_memory: bool) -> Iterator[tuple]:
    """All batches of ``source`` in order, decoded by so many processes.

    If that is None, the first two batches are decoded here. The second, for the first is slow for
    other reasons, decides by the time that the caller spends on it: no process where decoding takes
    less than a fifth of the whole, for on a CPU it would take a core from the forward pass and
    stall its other threads; else one for each core, up to eight. The batches are the same either
    way.
    """
    tried = min(2, len(source)) if workers is None else 0
    for index in range(tried):
        clock = time.perf_counter()
        batch = source[index]
        decoding = time.perf_counter() - clock
        yield batch
        waiting = time.perf_counter() - clock - decoding
        workers = 0 if decoding < waiting / 4 else min(8, os.cpu_count() or 1)
    if tried < len(source):
        yield from DataLoader(
            Subset(source, range(tried, len(source))),
            batch_size=None,
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # leaves torch's global one alone
        )


def _forward(
    model: nn.Module,
    pixels: Tensor,
    forward_sizes: list[list[int]],
    start: int,
    precision: str,
    device: torch.device,
) -> np.ndarray:
    """Embeddings [B, D], float32, of a batch of images; halves its passes until they fit."""
    while True:
        size = forward_sizes[-1][1]
        try:
            with torch.inference_mode(), half_precision(precision, device):
                parts = [model(p.to(device, non_blocking=True)) for p in pixels.split(size)]
                return torch.cat(parts).float().cpu().numpy()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise MemoryError(
                    f"embedding one image does not fit into the memory of {device}: "
                    "a smaller backbone, a smaller image_size or another device is needed"
                ) from error
        forward_sizes.append([start, size // 2])
        if device.type == "cuda":
            torch.cuda.empty_cache()


def unreadable_error(name: str, reason: str) -> ValueError:
    """What is raised for an image that cannot be read, if it may not be skipped."""
    remedy = "repair or remove it, or leave such images out with on_error='skip'"
    return ValueError(f"image {name!r}: {reason}; {remedy}")


def _as_dtype(x: np.ndarray, dtype: str, ids: Sequence[str], rows: list[int]) -> np.ndarray:
    """``x`` in the precision that is stored, every row of it finite."""
    with np.errstate(over="ignore"):  # said below, with the image
        converted = x.astype(dtype)
    remedy = "give dtype='float32'" if np.isfinite(x).all() else "give precision='fp32'"
    wrong = ~np.isfinite(converted).all(axis=1)
    if wrong.any():
        name = ids[rows[int(wrong.argmax())]]
        raise ValueError(f"image {name!r}: its embedding is not finite in {dtype}; {remedy}")
    return converted


def _save(part: Path, log_file: Path, log: dict, pending: list, num_rows: int) -> None:
    """Put the pending rows on disk, and after that the record that they are there."""
    if pending:
        new = {"shape": (num_rows, pending[0][1].shape[1]), "dtype": pending[0][1].dtype}
        options = {"mode": "r+"} if part.exists() else {"mode": "w+", **new}
        file = np.lib.format.open_memmap(part, **options)
        for rows, x in pending:
            file[rows] = x
        file.flush()
        del file  # unmapped, so that its pages do not count as this process's memory
    write_json(log_file, log)


def copy_rows(source: Path, rows: Sequence[int], target: Path) -> None:
    """Write some rows of an array's file to another file, whole or not at all, in flat memory."""
    x = np.load(source, mmap_mode="r")
    header = {"descr": x.dtype.str, "fortran_order": False, "shape": (len(rows), x.shape[1])}
    with whole_file(target) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(rows), 65536):
            file.write(x[rows[start : start + 65536]].tobytes())
