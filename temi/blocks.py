"""Rows of embeddings in blocks: several processes write them, each into files of its own."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from temi.files import read_json, whole_file, write_json

PARTS = "parts"
IDENTITY = "identity"
MOST = 256  # blocks, and so processes that can share the work, unless the next allows more
LARGEST = 65_536  # rows of a block
COPIED = 2**24  # bytes at a time


@dataclass(frozen=True)
class Blocks:
    """Rows that are being computed, cut into blocks of whole batches, however many processes work.

    A block is two files: the rows that could be embedded, as bare numbers one after the other, and
    a log of how far it is. No file is ever written by two processes that work on different blocks,
    so that network file systems have nothing to merge; and rows are on disk before the log says so,
    so that whatever is killed loses only what the log does not name yet.

    A log is a dict: ``rows``, how many of the block's rows are done; ``unreadable``, row (as text)
    -> reason, those of them that have no embedding; ``forward_sizes``, pairs of a row and the
    images in a forward pass from it on; ``shape`` of the decoded images; ``dim``.

    Attributes
    ----------
    folder : Path
        Of all blocks of these rows; who joins them moves it away.
    identity : dict
        What the embeddings depend on, the precision included.
    num_rows, batch_size : int
    dtype : str
    """

    folder: Path
    identity: dict
    num_rows: int
    batch_size: int
    dtype: str

    @classmethod
    def find(
        cls,
        folder: Path,
        identity: dict,
        num_rows: int,
        dtype: str,
        batch_size: int | None,
        default: Callable[[], int],
    ) -> "Blocks":
        """The blocks of embeddings of this identity below ``folder``, new where there are none.

        Those of another identity have another name, so that they are never mixed. Where
        ``batch_size`` is None, that of the blocks that are there is taken, else ``default()``.
        """
        text = json.dumps(identity, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        found = {path: len(os.listdir(path)) for path in (folder / PARTS).glob(f"{name}-*")}
        if batch_size is None and found:
            batch_size = int(max(found, key=lambda path: found[path]).name.split("-")[1])
        batch_size = batch_size or default()
        own = folder / PARTS / f"{name}-{batch_size}"
        own.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # joined by another process meanwhile
            write_json(own / IDENTITY, identity, shared=True)
        return cls(own, identity, num_rows, batch_size, dtype)

    @property
    def size(self) -> int:
        """Rows of a block, a multiple of the batch size."""
        wanted = min(LARGEST, -(-self.num_rows // MOST))
        return -(-wanted // self.batch_size) * self.batch_size

    @property
    def gone(self) -> bool:
        """Whether another process has joined the blocks."""
        return not self.folder.exists()

    def __len__(self) -> int:
        return -(-self.num_rows // self.size)

    def rows(self, block: int) -> range:
        """Rows of a block."""
        return range(block * self.size, min((block + 1) * self.size, self.num_rows))

    def left(self, block: int, log: dict | None) -> range:
        """Rows of a block that are not done yet, according to its log."""
        return self.rows(block)[log["rows"] if log else 0 :]

    def missing(self, logs: Sequence[dict | None]) -> int:
        """How many of all rows are not done yet."""
        return sum(len(self.left(block, log)) for block, log in enumerate(logs))

    def log(self, block: int) -> dict | None:
        """The log of a block; None where there is none, or the rows that it names are not there."""
        try:
            log: dict[str, Any] = read_json(self._file(block, "json"))
            whole = not kept(log) or self._file(block, "rows").stat().st_size >= self._bytes(log)
        except FileNotFoundError:
            return None
        return log if whole else None

    def logs(self) -> list[dict | None]:
        """The logs of all blocks."""
        return [self.log(block) for block in range(len(self))]

    def save(self, block: int, log: dict, parts: list[tuple[int, np.ndarray]]) -> None:
        """Put rows on disk, and after that the log that says so.

        ``parts`` are pairs of a place among the block's embeddings and what stands from there on:
        written twice, they are the same. A process that knew nothing of this one may be further:
        its log stays. Nothing is written once somebody has joined the blocks.
        """
        try:
            if parts:
                self._write(block, parts)
            if len(self.left(block, log)) <= len(self.left(block, self.log(block))):
                write_json(self._file(block, "json"), log, shared=True)
        except FileNotFoundError:
            if not self.gone:
                raise

    def _write(self, block: int, parts: list[tuple[int, np.ndarray]]) -> None:
        path = self._file(block, "rows")
        try:
            path.touch()
            with open(path, "r+b") as file:
                for place, x in parts:
                    file.seek(place * x.shape[1] * x.itemsize)
                    file.write(x.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            kept = "what was embedded before is kept, and the same command goes on"
            raise OSError(error.errno, f"{error.strerror}; {kept}", str(path)) from error

    def remove(self, block: int) -> None:
        """Start a block anew."""
        self._file(block, "json").unlink(missing_ok=True)

    def join(self, logs: Sequence[dict], target: Path) -> tuple[int, int]:
        """Write the embeddings of all blocks to one ``.npy`` file, in flat memory; its shape."""
        dim = next(log["dim"] for log in logs if kept(log))
        shape = sum(map(kept, logs)), dim
        descr = np.dtype(self.dtype).str
        with whole_file(target) as file:
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block, log in enumerate(logs):
                if not kept(log):
                    continue
                with open(self._file(block, "rows"), "rb") as source:
                    for start in range(0, self._bytes(log), COPIED):
                        file.write(source.read(min(COPIED, self._bytes(log) - start)))
        return shape

    def _file(self, block: int, kind: str) -> Path:
        return self.folder / f"{block:05d}.{kind}"

    def _bytes(self, log: dict) -> int:
        return kept(log) * log["dim"] * np.dtype(self.dtype).itemsize


def kept(log: dict) -> int:
    """How many of the rows that are done have an embedding."""
    return log["rows"] - len(log["unreadable"])


def joined_sizes(logs: Sequence[dict]) -> list[list[int]]:
    """Pairs of a row and the images in a forward pass from it on, over all blocks."""
    joined: list[list[int]] = []
    for log in logs:
        for row, size in log["forward_sizes"]:
            if not joined or joined[-1][1] != size:
                joined.append([row, size])
    return joined
