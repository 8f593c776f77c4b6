"""Rows that a training indexes, where they do not fit into memory: kept elsewhere, read in blocks.

Prepared embeddings are float32, twice what a file in half precision holds. Where they fit they are
one Tensor on the device; else :class:`Rows` stands for it, and whoever indexes it notices nothing.
"""

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from temi import distributed
from temi.embeddings import CHUNK, normalize

SHARE = 0.5  # of the memory that is left: the neighbour search holds the rows a second time
BLOCK = 2**16  # bytes read together: larger ones are faster, but fewer places make up a window
WINDOW = 2048  # blocks mixed with each other: 128 MB, which a small page cache holds
CPU = torch.device("cpu")


class Rows:
    """Prepared rows [N, P] that are brought to the device when they are asked for.

    Parameters
    ----------
    read : callable
        Gives the rows, on the CPU, of a Tensor of row numbers or a slice.
    shape : tuple of int
        N and P.
    device : torch.device
        Where ``rows[indices]`` and the chunks of ``rows.split(size)`` are, as those of a Tensor.
    dtype : torch.dtype
        Of the rows.
    """

    def __init__(
        self,
        read: Callable[[Tensor | slice], Tensor],
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.read, self.shape, self.device, self.dtype = read, shape, device, dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        return self.read(indices.cpu()).to(self.device)

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in their order, ``size`` at a time, equal to the bit to those of one Tensor."""
        held = torch.empty(0, self.shape[1], dtype=self.dtype)
        for start in range(0, len(self), CHUNK):  # as normalize does, whatever ``size`` is
            held = torch.cat([held, self.read(slice(start, start + CHUNK))])
            while len(held) >= size:
                yield held[:size].to(self.device)
                held = held[size:]
        if len(held):
            yield held.to(self.device)


def prepared_rows(
    x: np.ndarray,
    how: str,
    mean: np.ndarray,
    axes: np.ndarray | None,
    device: torch.device,
    place: str,
    block: int | None,
    group_size: int,
) -> Tensor | Rows:
    """Embeddings [N, D] as a training sees them: normalised, projected [N, D or P].

    Parameters
    ----------
    x, how, mean, axes
        See :func:`temi.embeddings.normalize`.
    device : torch.device
        Of the training.
    place : {"device", "host", "file"}
        Prepared now and kept on the device, or in the host's memory; or prepared when asked for.
    block : int or None
        Rows of a block of which all are asked for soon where one is asked for as an anchor.
    group_size : int
        What is asked for are anchors first, then so many less one neighbours of each.

    Returns
    -------
    Tensor or Rows
    """
    if place == "file":
        return rows_on_demand(x, how, mean, axes, device, block, group_size)
    prepared = torch.from_numpy(normalize(x, how, mean, axes))
    if place == "device":
        return prepared.to(device)
    return Rows(prepared.__getitem__, (len(prepared), prepared.shape[1]), device)


def rows_on_demand(
    x: np.ndarray,
    how: str,
    mean: np.ndarray,
    axes: np.ndarray | None,
    device: torch.device = CPU,
    block: int | None = None,
    group_size: int = 1,
    dtype: str = "float32",
) -> Rows:
    """Embeddings [N, D] that are normalised and projected when they are asked for.

    Parameters
    ----------
    x, how, mean, axes, dtype
        See :func:`temi.embeddings.normalize`.
    device, block, group_size
        See :func:`prepared_rows`.
    """

    def read(rows: Tensor | slice) -> Tensor:
        if isinstance(rows, Tensor):
            rows = rows.numpy()
            ask_for(x, rows[: len(rows) // group_size], block or 1)
            ask_for(x, rows)
        return torch.from_numpy(normalize(x[rows], how, mean, axes, dtype=dtype))

    width = x.shape[1] if axes is None else axes.shape[1]
    return Rows(read, (len(x), width), device, getattr(torch, dtype))


def choose_place(
    rows: str, x: np.ndarray, pca_dim: int | None, device: torch.device, search: bool
) -> str:
    """Where the rows of a training are kept: "device", "host" or "file".

    Parameters
    ----------
    rows : str
        One of these; or "auto": the first whose available memory is at least twice what prepared
        rows take.
    x : ndarray [N, D]
    pca_dim : int or None
        Dimensions that are kept of D, where it is less.
    device : torch.device
        Of the training.
    search : bool
        Whether neighbours are still to be searched.

    Raises
    ------
    ValueError
        If that is "file" and neighbours are to be searched.
    """
    count, dim = x.shape
    needed, left = 4 * count * min(dim, pca_dim or dim), available_memory(device)
    place = rows
    if rows == "auto":
        place = "device" if needed <= SHARE * left else "file"
        if place == "file" and device.type == "cuda" and needed <= SHARE * available_memory(CPU):
            place = "host"
    if place == "file" and search:
        raise ValueError(
            f"neighbors=None: rows that stay in their file are not searched; give neighbors "
            f"[{count}, k] or keep_rows='device' (prepared they take {needed / 1e9:.2g} GB; "
            f"{left / 1e9:.2g} GB are available, of which {SHARE:.0%} are taken)"
        )
    return place


def available_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can be had on a device.

    On a GPU what is free, or kept by torch for later; else what the machine has available, or what
    the control groups of this process leave it, where that is less, shared by the processes that
    train together on the machine.

    Parameters
    ----------
    device : torch.device
    root : Path
        Below which ``proc`` and ``sys`` are.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    left = min([psutil.virtual_memory().available, *_left_by_groups(root)])
    return left // distributed.on_this_machine()


def _left_by_groups(root: Path) -> Iterator[int]:
    """What each limited control group around this process leaves: psutil knows nothing of them.

    Files in the page cache count towards a limit, but make room when it is needed.
    """
    membership = root / "proc" / "self" / "cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            mount, limit, used = root / "sys/fs/cgroup", "memory.max", "anon"
        elif controllers == "memory":  # version 1
            mount, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "total_rss"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):  # a limit holds for all groups below it
            most = (folder / limit).read_text().strip() if (folder / limit).exists() else "max"
            if most != "max":
                lines = (folder / "memory.stat").read_text().splitlines()
                yield int(most) - int(dict(line.split() for line in lines)[used])


def ask_for(x: np.ndarray, rows: np.ndarray, block: int = 1) -> None:
    """Ask the system for the pages of these rows, all at once, if ``x`` is mapped from a file.

    Touched one by one, each page would be waited for, and the system, which expects a file to be
    read from its start to its end, would read up to megabytes around each.

    Parameters
    ----------
    x : ndarray [N, D]
    rows : ndarray of int
    block : int
        Rows that are read together: all of the block in which a row is.
    """
    mapped = getattr(x, "_mmap", None)
    known = hasattr(mmap, "MADV_WILLNEED")  # not on Windows
    if mapped is None or not known or not len(rows) or not x.flags.c_contiguous:
        return
    start = x.ctypes.data - np.frombuffer(mapped, dtype=np.uint8).ctypes.data
    blocks = np.unique(rows // block)
    ends = np.minimum((blocks + 1) * block, len(x)) * x.strides[0]
    first = (start + blocks * block * x.strides[0]) // mmap.PAGESIZE
    last = (start + ends - 1) // mmap.PAGESIZE + 1  # not included
    gaps = np.flatnonzero(first[1:] > last[:-1]) + 1
    pieces = zip(first[np.r_[0, gaps]], last[np.r_[gaps - 1, len(last) - 1]], strict=True)
    for page, end in pieces:
        length = int(end - page) * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_WILLNEED, int(page) * mmap.PAGESIZE, length)


def rows_per_block(x: np.ndarray) -> int:
    """Consecutive rows [N, D] that are read together."""
    return max(1, BLOCK // x[0].nbytes)


def block_order(count: int, block: int, generator: torch.Generator) -> Tensor:
    """A permutation [count] that visits rows in a file's order where it can, and mixes well.

    Blocks of consecutive rows are shuffled; each 2,048 of them, as they then stand, are a window,
    whose rows are shuffled. So what is read lies together, while a batch holds rows of a hundred
    places or more: of a file sorted by class, of many classes.

    Parameters
    ----------
    count : int
    block : int
        Rows in a block; the last may hold fewer.
    generator : torch.Generator
        On the CPU.
    """
    order = torch.empty(count, dtype=torch.int64)
    filled = 0
    for blocks in torch.randperm(-(-count // block), generator=generator).split(WINDOW):
        rows = (blocks.unsqueeze(1) * block + torch.arange(block)).flatten()
        rows = rows[rows < count]
        mixed = rows[torch.randperm(len(rows), generator=generator)]
        order[filled : filled + len(rows)] = mixed
        filled += len(rows)
    return order
