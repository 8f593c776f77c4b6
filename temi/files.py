"""Where files go, and that they appear whole or not at all."""

import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from boltons.fileutils import atomic_save

_PLAIN = re.compile(r"[a-z0-9_]([a-z0-9._+-]{0,58}[a-z0-9_+-])?")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # what Windows keeps for itself

RESULTS = "final_results.json"  # of a run directory, as the next
SETTINGS = "config.json"
CHECKOUT = Path(__file__).parents[1]


def home() -> Path:
    """Folder below which everything is written.

    The environment variable ``TEMI_HOME`` where it is set; else the project's root, where this
    package is used from a checkout; else the current folder.
    """
    if os.environ.get("TEMI_HOME"):
        return expanded(os.environ["TEMI_HOME"]).absolute()
    checked_out = (CHECKOUT / "pyproject.toml").exists() and (CHECKOUT / "notebooks").is_dir()
    return CHECKOUT if checked_out else Path.cwd()  # site-packages may hold a pyproject.toml


def expanded(path: str | Path) -> Path:
    """The path with a home folder for its ``~``; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def writable_path(path: str | Path) -> Path:
    """Where a path given for writing leads, if it is not absolute: below :func:`home`."""
    return absolute(home() / expanded(path))


def readable_path(path: str | Path) -> Path:
    """Where a path given for reading leads: from the current folder, else below :func:`home`."""
    path = expanded(path)
    return absolute(path) if path.exists() else writable_path(path)


def absolute(path: Path) -> Path:
    """The path from the root on, without ``..``: one name for a folder, wherever it is named."""
    return path.resolve() if ".." in path.parts else path.absolute()


def results_file(name: str) -> Path:
    """Path of a table in the checkout's folder ``results``, which chapters read."""
    return CHECKOUT / "results" / name


def path_part(name: str) -> str:
    """A folder name for any data set, backbone or folder, valid on every system.

    Short names of lower-case letters, digits and ``_ . + -`` stay as they are; any other keeps its
    safe characters and gets a hash of the whole, so that two names never share a folder.
    """
    if _PLAIN.fullmatch(name) and not _DEVICES.fullmatch(name):
        return name
    safe = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")[-40:]
    return f"{safe}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}".lstrip("-")


@contextmanager
def whole_file(path: Path, *, shared: bool = False) -> Iterator[IO[bytes]]:
    """A file to write bytes to, beside ``path``, that takes its place once flushed and closed.

    Parameters
    ----------
    path : Path
    shared : bool
        Whether others may write it at the same time: each then has a file of its own beside it,
        which a kill leaves there; else the next to write replaces that.

    Raises
    ------
    OSError
        If it cannot be written (a full disk, say): what stood at ``path`` is as it was.
    """
    try:
        part = f"{path.name}.{secrets.token_hex(4)}.part" if shared else None
        with atomic_save(os.fspath(path), part_file=part, overwrite_part=True) as file:
            yield file
    except (OSError, RuntimeError) as error:
        # torch.save says RuntimeError over the OSError of a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(
            cause.errno,
            f"{cause.strerror or cause}; what stood there before is as it was",
            str(path),
        ) from error


def write_whole(path: Path, text: str, *, shared: bool = False) -> None:
    """Write a text file, in UTF-8, whole or not at all; see :func:`whole_file`."""
    with whole_file(path, shared=shared) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any, *, shared: bool = False) -> None:
    """Write JSON, whole or not at all; NaN and infinity, which JSON has not, are an error."""
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n", shared=shared)


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises
    ------
    ValueError
        If it is damaged; names it.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged, no whole JSON file ({error}); remove it") from error


def check_writable(name: str, folder: Path) -> None:
    """Raise a ValueError, which names the option, unless a folder takes files; makes it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name}={str(folder)!r}: nothing can be written there ({error.strerror}); give another"
        ) from error


def wait_until(look: Callable[[], bool], seconds: float = 90.0) -> bool:
    """Whether ``look`` says so, now or once a network file system shows what others have written.

    Such a system may show a folder as it was up to a minute ago.
    """
    over = time.monotonic() + seconds
    while not (seen := look()) and time.monotonic() < over:
        time.sleep(0.5)
    return seen


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
