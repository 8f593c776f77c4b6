"""Checkpoints: written whole or not at all, and verified before a byte of them is believed.

A checkpoint is what :func:`torch.save` writes, followed by a trailer of fixed length: the format's
name and version, the position in the training, and the SHA-256 of all that comes before. One file
holds both, so no moment exists in which the two do not belong together; :func:`torch.load` takes no
notice of the trailer. Names in ``checkpoints/``:

==============================  ==================================================================
``checkpoint_latest.pth``       after the latest whole epoch, or one up to ten seconds before
``checkpoint_previous.pth``     the one before, for when the latest is damaged
``checkpoint_best.pth``         after the best epoch so far; see :class:`temi.RunOptions`
``checkpoint_epoch_0010.pth``   after every tenth epoch, or as ``checkpoint_every`` says
``checkpoint_emergency.pth``    after the last complete step of a training that was cut short; goes
                                when a later checkpoint is whole
==============================  ==================================================================

Those of the same epoch are hard links to the same bytes, copies where a file system has no links.
"""

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from temi.files import whole_file

FOLDER = "checkpoints"
LATEST = "checkpoint_latest.pth"
PREVIOUS = "checkpoint_previous.pth"
BEST = "checkpoint_best.pth"
EMERGENCY = "checkpoint_emergency.pth"
VERSION = 1
_TRAILER = "\ntemi checkpoint v{:04d} {:04d} {:08d} {:08d} "  # then the checksum, 64 digits
_PATTERN = re.compile(_TRAILER.replace("{:04d}", r"(\d{4})").replace("{:08d}", r"(\d{8})"))
_LENGTH = len(_TRAILER.format(0, 0, 0, 0)) + 64


class CheckpointError(ValueError):
    """A file that is no whole checkpoint, with the reason."""


class Position(NamedTuple):
    """How far a training has come; the later of two positions is the greater."""

    retries: int
    epoch: int  # whole epochs
    step: int  # steps of the next epoch


def save(path: Path, content: dict, position: Position) -> None:
    """Write a checkpoint, whole or not at all.

    Parameters
    ----------
    path : Path
    content : dict
        Tensors, numbers, texts, and dicts and lists of these.
    position : Position
        Kept in the trailer, so that the newest of several is found without reading them.

    Raises
    ------
    OSError
        If it cannot be written; what stood at ``path`` is as it was.
    """
    with whole_file(path) as file:
        hashing = _HashingFile(file)
        torch.save(content, hashing)  # type: ignore[arg-type]  # all that torch asks of a file
        hashing.write(_TRAILER.format(VERSION, *position).encode())
        file.write(hashing.digest.hexdigest().encode())


class _HashingFile:
    """Takes the checksum of what passes through to a file."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, block) -> int:
        self.digest.update(block)
        return self.file.write(block)

    def flush(self) -> None:
        self.file.flush()


def position_of(path: Path) -> Position:
    """Position that a checkpoint's trailer states, without verifying the rest.

    Raises
    ------
    CheckpointError
        If there is no such trailer, or one of another version.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LENGTH))
        found = _PATTERN.match(file.read().decode("latin-1"))
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    if not found:
        raise CheckpointError(f"{path}: no checkpoint of temi, or cut short")
    version, *position = map(int, found.groups())
    if version != VERSION:
        raise CheckpointError(f"{path}: of format {version}; this version of temi reads {VERSION}")
    return Position(*position)


def load(path: Path) -> dict:
    """Read a checkpoint after verifying every byte; nothing in it can run code.

    Returns
    -------
    dict
        As given to :func:`save`, tensors on the CPU.

    Raises
    ------
    CheckpointError
        With the reason, if the file is empty, cut short, damaged, of another format or origin, or
        holds anything but tensors, numbers, texts, dicts and lists.
    """
    position_of(path)
    with open(path, "rb") as file:
        digest, left = hashlib.sha256(), path.stat().st_size - 64
        while left:
            block = file.read(min(left, 1 << 20))
            digest.update(block)
            left -= len(block)
        if digest.hexdigest().encode() != file.read():
            raise CheckpointError(f"{path}: damaged, the bytes do not have their checksum")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{path}: holds more than tensors, numbers and texts; it was not read"
            ) from None


def newest(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint of a folder that is whole, and its content; None where there is none.

    Warns of those that are damaged, as far as they may be newer.

    Raises
    ------
    CheckpointError
        If there are checkpoints and all are damaged.
    """
    damaged, found = [], []
    for path in sorted(folder.glob("*.pth")):
        try:
            found.append((position_of(path), path.name == LATEST, path))
        except CheckpointError as error:
            damaged.append(str(error))
    for _, _, path in sorted(found, reverse=True):
        try:
            content = load(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            warnings.warn(f"{reason}; going on from {path.name}", stacklevel=2)
        return path, content
    if damaged:
        raise CheckpointError(f"no checkpoint is whole: {'; '.join(damaged)}")
    return None


def up_to(source: Path) -> list[Path]:
    """The checkpoints beside one that are no later than it; damaged ones say nothing of that."""
    found, last = [], position_of(source)
    for path in source.parent.glob("checkpoint_*.pth"):
        with contextlib.suppress(CheckpointError):
            if position_of(path) <= last:
                found.append(path)
    return found


def save_latest(folder: Path, content: dict, position: Position) -> None:
    """Write ``checkpoint_latest.pth`` and keep the one before it."""
    if (folder / LATEST).exists():
        link(folder / LATEST, folder / PREVIOUS)
    save(folder / LATEST, content, position)
    (folder / EMERGENCY).unlink(missing_ok=True)


def keep_latest(folder: Path, epoch: int, best: bool, every: int, limit: int) -> None:
    """Give ``checkpoint_latest.pth`` the other names that it deserves.

    Parameters
    ----------
    folder : Path
    epoch : int
        Whole epochs behind it.
    best : bool
        Whether the epoch was the best so far.
    every, limit : int
        Every so many epochs one stays, at most so many of them; the oldest go.
    """
    if best:
        link(folder / LATEST, folder / BEST)
    if epoch % every == 0 and limit:
        link(folder / LATEST, folder / f"checkpoint_epoch_{epoch:04d}.pth")
    named = sorted(folder.glob("checkpoint_epoch_*.pth"), key=lambda path: (len(path.name), path))
    kept = sorted(named, key=_position_if_whole)  # after a retry, epochs are counted anew
    for path in kept[: max(0, len(kept) - limit)]:
        path.unlink()


def _position_if_whole(path: Path) -> Position:
    """Position of a checkpoint; before all others where it states none."""
    try:
        return position_of(path)
    except CheckpointError:
        return Position(-1, 0, 0)


def link(source: Path, target: Path) -> None:
    """Let ``target`` be the same bytes as ``source``, in the place of what it was."""
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:  # no hard links on this file system
        shutil.copyfile(source, part)
    os.replace(part, target)
    part.unlink(missing_ok=True)  # still there where both were the same file already
