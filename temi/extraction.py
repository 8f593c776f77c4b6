"""From images to blocks of embeddings: decoding, batches, and going on after an interruption."""

import os
import re
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

from temi.backbones import Backbone, named_size
from temi.blocks import Blocks, kept
from temi.checks import check_types
from temi.config import Device, Precision
from temi.data import ImageSet
from temi.devices import (
    check_precision,
    half_precision,
    is_out_of_memory,
    keep_freed_memory,
    resolve_device,
    uses_bf16,
)
from temi.distributed import count, from_first, image_bar, on_this_machine, rank
from temi.image_files import UnreadableImageError, needed_at

BLANK = "its embedding is all zeros, which has no direction"
SAVE_SECONDS = 10.0  # what a killed extraction loses at most
SAVE_BYTES = 2**25  # what waits in memory to be written at most
# Of one image side times the other, in a forward pass on a CPU: what it makes then stays within the
# caches, and within what malloc reuses. Up to three times faster than 64 images of 224 x 224
# (benchmarks/embedding.py).
CPU_PASS_PIXELS = {"fp32": 2**18, "bf16": 2**19}
# Forward passes that decoding must take the time of before processes of their own do it. On a CPU
# they take cores from the forward pass and stall its other threads: measured on two.
SLOW_ON_CPU, SLOW_BESIDE_GPU = 3.0, 0.25


@dataclass(frozen=True)
class ExtractionConfig:
    """How embeddings are computed; see :func:`temi.embed` and :func:`temi.embed_shard`.

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
    shard: Annotated[
        str | None,
        Field(
            description="embed a share alone, of an array of jobs: '1/8' to '8/8'; the job that "
            "finds nothing missing any more joins all shares; None: everything"
        ),
    ] = None

    def __post_init__(self):
        check_types(self)
        shard = re.fullmatch(r"0*([1-9]\d*)/(\d+)", self.shard or "1/1", re.ASCII)
        if not shard or int(shard[1]) > int(shard[2]):
            raise ValueError(f"shard={self.shard!r}: None or '1/N' to 'N/N' is allowed, as '1/8'")
        check_precision(self.precision, resolve_device(self.device))

    @property
    def share(self) -> slice:
        """Of all blocks, those that ``shard`` names."""
        number, of = map(int, (self.shard or "1/1").split("/"))
        return slice(number - 1, None, of)


def extract(
    images: ImageSet,
    backbone: Backbone,
    folder: Path,
    identity: dict,
    config: ExtractionConfig,
    force: bool = False,
) -> Blocks:
    """Embed all images, or a share of them, into blocks, or go on where that was stopped.

    Every ten seconds, and when it is interrupted, what has been computed is flushed to disk, and
    then the logs of the blocks say how far they go. An extraction that is continued, by however
    many processes, repeats the batches of the interrupted one and so gives the same embeddings, to
    the bit on the same machine.

    Parameters
    ----------
    images : ImageSet
    backbone : Backbone
    folder : Path
        Exists.
    identity : dict
        What the embeddings depend on; blocks of another identity are not used.
    config : ExtractionConfig
    force : bool
        Compute the share even where its blocks are there.

    Returns
    -------
    Blocks
        Those of this process's share are done; other ranks may be at theirs still. Or they are gone
        (``blocks.gone``), as processes that knew nothing of this one did the same and were faster.
    """
    device = resolve_device(config.device)
    precision = from_first(lambda: "bf16" if uses_bf16(config.precision, device) else "fp32")

    def look() -> tuple[Blocks, list[dict | None]]:
        blocks = Blocks.find(
            folder, identity | {"precision": precision}, len(images), config.dtype,
            config.batch_size, lambda: default_batch_size(backbone, device, precision),
        )  # fmt: skip
        if force:
            for block in range(len(blocks))[config.share]:
                blocks.remove(block)
        return blocks, blocks.logs()

    blocks, known = from_first(look)  # all ranks share the same work, whatever the others did since
    share = range(len(blocks))[config.share]
    mine = [block for block in share if blocks.left(block, known[block])][rank() :: count()]
    logs = {block: log for block in mine if (log := known[block])}
    found = [log for log in known if log]
    size = min([blocks.batch_size, *(log["forward_sizes"][-1][1] for log in found)])
    shape = next((tuple(log["shape"]) for log in found if log["shape"]), None)

    if device.type == "cpu":
        keep_freed_memory()
    model = backbone.model.to(device)
    model.to(memory_format=torch.channels_last)
    workers = config.num_workers
    if workers is None and named_size(backbone.name)[0] == "pixels":
        workers = 0
    left = [blocks.left(block, logs.get(block)) for block in mine]
    source = _Batches(images, backbone, blocks.batch_size, left)
    batches = _decoded(source, workers, device)
    done = sum(len(blocks.rows(block)) - len(blocks.left(block, known[block])) for block in share)
    total, name = done + sum(map(len, left)), f"embedding with {backbone.name}"
    bar = image_bar(total, name, shown=config.progress, initial=done, mininterval=1)
    pending: dict[int, list[tuple[int, np.ndarray]]] = {}  # of each block
    saved = time.monotonic()
    try:
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            start, pixels, rows, unreadable = batch
            block, decoded = start // blocks.size, len(rows) + len(unreadable)
            fresh = {"rows": 0, "unreadable": {}, "forward_sizes": [[start, size]], "shape": shape}
            log = logs.setdefault(block, fresh)
            parts = pending.setdefault(block, [])
            update: dict[str, Any] = {"rows": log["rows"] + decoded}
            if rows:
                shape = shape or tuple(pixels.shape[1:])
                check_shape(images.ids[rows[0]], pixels.shape[1:], shape)  # the same in all batches
                x = _forward(model, pixels, log["forward_sizes"], start, precision, device)
                size = log["forward_sizes"][-1][1]
                x = _as_dtype(x, config.dtype, images.ids, rows)
                blank = ~x.any(axis=1)  # no direction, so no neighbours
                unreadable |= {rows[i]: BLANK for i in np.flatnonzero(blank)}
                update |= {"shape": shape, "dim": x.shape[1]}
            if unreadable and config.on_error == "stop":
                row, reason = next(iter(unreadable.items()))
                raise unreadable_error(images.ids[row], reason)
            if rows:
                parts.append((kept(log), x[~blank]))
            reasons = {str(row): reason for row, reason in sorted(unreadable.items())}
            # An interruption comes before this line or after it: rows and log always agree.
            logs[block] = log | update | {"unreadable": log["unreadable"] | reasons}
            bar.update(decoded)
            waiting = sum(x.nbytes for parts in pending.values() for _, x in parts)
            if time.monotonic() - saved > SAVE_SECONDS or waiting > SAVE_BYTES:
                _save(blocks, logs, pending)
                pending, saved = {}, time.monotonic()
                if blocks.gone:
                    break
    finally:
        bar.close()
        _save(blocks, logs, pending)
    return blocks


def _save(blocks: Blocks, logs: dict[int, dict], pending: dict[int, list]) -> None:
    """Put on disk what is pending of each block."""
    for block, parts in pending.items():
        blocks.save(block, logs[block], parts)


Decoded = tuple[int, Tensor, list[int], dict[int, str]]  # start, pixels, rows, unreadable


class _Batches(Dataset):
    """Batches of decoded images of some rows; an item is one batch, made in a worker process."""

    def __init__(self, images: ImageSet, backbone: Backbone, batch_size: int, left: list[range]):
        self.pictures, self.prepare = needed_at(images.images, backbone.side), backbone.prepare
        self.ids = images.ids
        self.starts = [start for rows in left for start in rows[::batch_size]]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Decoded | Exception:
        try:
            return self._decode(self.starts[index])
        except (ValueError, OSError, MemoryError) as error:
            return error  # raised by extract: here a worker process would add its traceback

    def _decode(self, start: int) -> Decoded:
        pictures, rows, unreadable = [], [], {}
        for row in range(start, min(start + self.batch_size, len(self.ids))):
            try:
                pictures.append(self.prepare(self.pictures[row]))
                rows.append(row)
                check_shape(self.ids[row], pictures[-1].shape, pictures[0].shape)
            except UnreadableImageError as error:
                unreadable[row] = error.reason
        pixels = np.stack(pictures) if pictures else np.empty(0, dtype=np.uint8)
        return start, torch.from_numpy(pixels), rows, unreadable


def check_shape(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Raise a ValueError unless a prepared image is of the shape that those before have.

    Those of ``pixels`` alone may not be.
    """
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"image {name!r} is {' x '.join(map(str, shape))} where those before are "
            f"{' x '.join(map(str, expected))}: give image_size, which brings all to one size"
        )


def default_batch_size(backbone: Backbone, device: torch.device, precision: str) -> int:
    """Images decoded and embedded together where the caller leaves it open."""
    if device.type != "cpu":
        return 512
    height, width = backbone.prepare(np.zeros((1, 1), dtype=np.uint8)).shape[:2]
    return min(64, max(1, CPU_PASS_PIXELS[precision] // (height * width)))


def _decoded(source: _Batches, workers: int | None, device: torch.device) -> Iterator:
    """All batches of ``source`` in order, decoded by so many processes.

    If that is None, the first two batches are decoded here. The second, for the first is slow for
    other reasons, decides by the time that the caller spends on it: no process where decoding is
    slow beside what the device needs; else one for each core that no other rank needs, up to eight.
    The batches are the same either way.
    """
    tried = min(2, len(source)) if workers is None else 0
    for index in range(tried):
        clock = time.perf_counter()
        batch = source[index]
        decoding = time.perf_counter() - clock
        yield batch
        waiting = time.perf_counter() - clock - decoding
        cores = (os.cpu_count() or 1) // on_this_machine()
        slow = SLOW_ON_CPU if device.type == "cpu" else SLOW_BESIDE_GPU
        workers = 0 if decoding < slow * waiting else min(8, max(1, cores))
    if tried < len(source):
        yield from DataLoader(
            Subset(source, range(tried, len(source))),
            batch_size=None,
            num_workers=min(workers or 0, len(source) - tried),
            pin_memory=device.type == "cuda",
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
