"""The run directory: what may be written where, and where a run grows.

``config.json`` stands from the start; ``final_results.json``, ``assignments.csv`` and the
TensorBoard logs after every epoch, the checkpoints after the first, the last, those that are to
stay, and others ten seconds or more after one was written; ``clusters.png`` at the end. Each file
appears whole or not at all. ``final_results.json`` says under ``finished`` whether the run is.

A run grows in its directory. Where a finished run stands, its successor grows beside it, in the
hidden directory ``.NAME.part``, and takes its place when finished. An unfinished run goes on with
``resume="auto"``, or with the path of one of its checkpoints, and is removed by
``overwrite=True`` alone. With the path of another run's checkpoint a new run starts where that one
was, with links to its checkpoints and a copy of its logs; so does ``resume="auto"`` in the
directory of a finished run, which is how that run gets more epochs.

One process at a time trains in a run directory: ``.NAME.lock`` beside it says so while it does.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from temi import checkpoints
from temi.config import RunOptions, TrainConfig
from temi.data import BOTH, ImageSet
from temi.embeddings import Features, spaces_of
from temi.files import (
    RESULTS,
    SETTINGS,
    check_writable,
    expanded,
    home,
    path_part,
    read_json,
    readable_path,
    writable_path,
)
from temi.image_files import ImageFiles
from temi.parameters import JobConfig
from temi.results import run_settings

LONGEST = 150  # letters of a run directory's name, which the lock and the successor add to


@dataclass(frozen=True)
class Place:
    """Where a run grows, where it will stand, and what it goes on from.

    Attributes
    ----------
    run_dir, folder : Path or None
        Where the finished run will stand, and where it grows until then: the same, but for the
        successor of a finished run. None: nothing is written.
    source : Path or None
        A checkpoint, or a folder of checkpoints, to go on from. None: a fresh start.
    """

    run_dir: Path | None
    folder: Path | None
    source: Path | None

    @property
    def replaces(self) -> bool:
        """Whether a finished run stands there, of which no checkpoint is gone on from."""
        goes_on = self.source is not None and self.run_dir in self.source.parents
        return self.folder != self.run_dir and not goes_on

    def load(self) -> tuple[Path, dict] | None:
        """Path and content of the checkpoint to go on from; None for a fresh start."""
        if self.source is None:
            return None
        if self.source.name == checkpoints.FOLDER:  # not there, where it was stopped before
            return checkpoints.newest(self.source)
        return self.source, checkpoints.load(self.source)


def plan_run(
    job: JobConfig, config: TrainConfig, data: ImageSet | Features
) -> tuple[TrainConfig, Path]:
    """Hold a job against its data and its run directory, before any work.

    Parameters
    ----------
    job : JobConfig
    config : TrainConfig
    data : ImageSet or Features
        What ``job.load()`` gave.

    Returns
    -------
    TrainConfig
        With the number of clusters, and what else :meth:`temi.TrainConfig.resolve` says; but the
        batch, where it is all images, is left to :func:`temi.train`, which knows how many could be
        read.
    Path
        ``job.run_dir``, a relative one below :func:`temi.files.home`; else
        ``runs/DATASET-BACKBONE``, followed by the settings that differ from the recipe.

    Raises
    ------
    ValueError
        See :meth:`temi.TrainConfig.resolve`; or what stands in the folder would be lost or is of
        other images, it lies among the images, or nothing can be written where it would be.
    """
    dataset = data.name if isinstance(data, ImageSet) else data.dataset
    backbone = job.backbone if isinstance(data, ImageSet) else data.backbone
    size = f"-{job.image_size}px" * (job.image_size is not None)
    run_dir = default_run_dir(dataset, backbone + size, config)
    if job.run_dir is not None:
        run_dir = writable_path(job.run_dir)
    check_outside(run_dir, data if isinstance(data, ImageSet) else None)
    resolved = config.resolve(len(data), data.num_classes)
    settings = run_settings(dataset, backbone, resolved)
    if resolved.batch_size != config.batch_size:  # cut to all images, some of them unreadable maybe
        del settings["batch_size"]
        resolved = replace(resolved, batch_size=config.batch_size)
    place = find_place(run_dir, settings, job)
    holds = f"run_dir={str(run_dir)!r}: holds a run with"
    if isinstance(data, Features):
        check_origin(place, job, data.manifest, None)
    elif place.replaces and not (job.resume or job.overwrite):
        made_from = read_json(run_dir / RESULTS)["provenance"]["features"]
        before = made_from.get("job", job.source)  # nothing is known of what Python embedded
        now = dict.fromkeys(before) | job.source
        _refuse(differences(before, now, "dataset", "labels"), holds)  # labels score, no more
    if isinstance(data, ImageSet) and not job.overwrite:
        _refuse(_other_images(place, data), holds, data=True)
    check_writable("run_dir", run_dir.parent)
    return resolved, run_dir


def check_outside(run_dir: str | Path | None, images: ImageSet | None) -> None:
    """Raise a ValueError if a run would grow among its images, as one of which its picture ends."""
    if run_dir is None or images is None or not isinstance(images.images, ImageFiles):
        return
    folder, root = expanded(run_dir).resolve(), Path(images.images.root).resolve()
    if not folder.is_relative_to(root):
        return
    below = folder.relative_to(root).parts
    beside_both = images.name.endswith(BOTH) and below and below[0] not in ("train", "test")
    if not beside_both and not any(part.startswith(".") for part in below):  # looked into
        raise ValueError(
            f"run_dir={str(run_dir)!r}: lies among the images, and its clusters.png would be taken "
            "for one of them; give a folder elsewhere"
        )


def _other_images(place: Place, images: ImageSet) -> list[str]:
    """In words, which images are new or gone since the run that is gone on from or replaced."""
    run_dir, source = place.run_dir, place.source
    if source is not None:
        run_dir = source.parent if source.name == checkpoints.FOLDER else source.parent.parent
    elif not place.replaces:
        return []
    try:
        table = pd.read_csv(
            run_dir / "assignments.csv", usecols=["path"], dtype=str, keep_default_na=False
        )
        left_out = read_json(run_dir / RESULTS)["provenance"]["features"].get("unreadable", ())
    except (OSError, ValueError, KeyError):  # missing or damaged: nothing says which they were
        return []
    before, now = {*table["path"], *left_out}, {*images.ids}
    parts = [f"{len(names)} {what}: {min(names)}" for names, what in
             ((now - before, "new"), (before - now, "gone")) if names]  # fmt: skip
    return [f"other images ({'; '.join(parts)})"] if parts else []


def default_run_dir(dataset: str, backbone: str, config: TrainConfig) -> Path:
    """``runs/DATASET-BACKBONE``, followed by the settings that differ from the recipe.

    They are those given, before :meth:`temi.TrainConfig.resolve`: a number of clusters counts.
    """
    parts = [path_part(dataset), path_part(backbone)]
    parts += [config.recipe] * (config.recipe != "fast")
    parts += [path_part(f"{name}{value}".lower()) for name, value in config.changes().items()]
    name = "-".join(parts)
    if len(name) > LONGEST:
        name = name[: LONGEST - 9] + path_part(name)[-9:]  # a hash
    return home() / "runs" / name


def find_place(run_dir: str | Path | None, settings: dict, options: RunOptions) -> Place:
    """Where a run may grow without destroying anything that is wanted.

    Changes nothing, but for a finished successor whose way to its place was cut short.

    Parameters
    ----------
    run_dir : path or None
    settings : dict
        From :func:`temi.results.run_settings`.
    options : RunOptions

    Returns
    -------
    Place

    Raises
    ------
    ValueError
        One line, if the directory holds something else than a run, a run of other settings or an
        unfinished one and neither ``resume`` nor ``overwrite`` says what to do with it; if there
        is no checkpoint at ``resume``; or if another process trains there.
    """
    resume = None if options.resume in (None, "auto") else _find_file(options.resume)
    if run_dir is None:
        if options.resume == "auto":
            raise ValueError("resume='auto': looks in run_dir; give it, or a checkpoint's path")
        return Place(None, None, resume)
    run_dir = expanded(run_dir).resolve()
    try:
        str(run_dir).encode()
    except UnicodeEncodeError:
        raise ValueError(f"run_dir={str(run_dir)!r}: no UTF-8, which TensorBoard needs") from None
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir={str(run_dir)!r}: a file; a folder is allowed, or a new name")
    if lock_of(run_dir).exists():  # a killed process leaves the file, but not the lock
        with locked(run_dir):
            pass
    settle(run_dir)
    standing = stage(run_dir)
    folder = part_of(run_dir) if standing == "finished" else run_dir
    growing = stage(folder) == "unfinished"
    holds = f"run_dir={str(run_dir)!r}: holds"

    if options.resume == "auto":
        last = next((place for place in (folder, run_dir) if stage(place)), None)
        if last is None:
            return Place(run_dir, folder, None)
        before = read_json(last / SETTINGS)
        _refuse(not_resumable(before, settings), f"{holds} a run with")
        return Place(run_dir, folder, last / checkpoints.FOLDER)
    if options.overwrite:
        return Place(run_dir, folder, resume)
    if growing and (resume is None or folder not in resume.parents):
        raise ValueError(
            f"{holds} an unfinished run; give resume='auto' to go on with it, overwrite=True to "
            "start anew, or another run_dir"
        )
    place = Place(run_dir, folder, resume)
    if place.replaces:
        before = read_json(run_dir / SETTINGS)
        _refuse(differences(before, settings), f"{holds} a run with")
    return place


def check_origin(place: Place, options: RunOptions, manifest: dict, neighbors: str | None) -> None:
    """Raise a ValueError if a finished run of other data would be replaced unasked.

    Data are the checksums of the embeddings, in their manifest, and of neighbours that are given.
    """
    if options.overwrite or options.resume == "auto" or not place.replaces:
        return
    kept = read_json(place.run_dir / RESULTS)["provenance"]
    before, now = (
        [space.get("sha256") for space in spaces_of(made_from)]
        for made_from in (kept["features"], manifest)
    )
    found = ["other embeddings"] * (before != now)
    found += ["other neighbours"] * (kept.get("neighbors") != neighbors)
    _refuse(found, f"run_dir={str(place.run_dir)!r}: holds a run with", data=True)


def part_of(run_dir: Path) -> Path:
    """Where the successor of a finished run grows."""
    return run_dir.with_name(f".{run_dir.name}.part")


def lock_of(run_dir: Path) -> Path:
    """File that is locked while a process trains in a run directory."""
    return run_dir.with_name(f".{run_dir.name}.lock")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes, also of other machines, out of a run directory.

    The end of this process, a kill included, opens it to them.

    Raises
    ------
    ValueError
        If another process has locked it.
    """
    path = lock_of(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"run_dir={str(run_dir)!r}: another process trains there; give another run_dir, or "
            f"wait for its end (if there is none, remove {path})"
        ) from None
    try:
        yield
    finally:
        with suppress(PermissionError):  # on Windows, where the release removes it
            path.unlink(missing_ok=True)
        lock.release()


def settle(run_dir: Path) -> None:
    """Put a finished successor in its place, if there is one."""
    part, old = part_of(run_dir), run_dir.with_name(f".{run_dir.name}.old")
    if stage(part) == "finished":
        if run_dir.exists():
            run_dir.rename(old)
        part.rename(run_dir)
    shutil.rmtree(old, ignore_errors=True)


def check_resumable(
    content: dict, settings: dict, fingerprint: str, neighbors: str | None = None
) -> None:
    """Raise a ValueError, naming the difference, unless a checkpoint fits data and settings.

    Data are the checksums of the embeddings and, where they are given, of the neighbours.
    """
    of = "resume: the checkpoint is of a run with"
    _refuse(not_resumable(content["config"], settings), of)
    found = ["other embeddings"] * (content["fingerprint"] != fingerprint)
    found += ["other neighbours"] * (content.get("neighbors") != neighbors)
    _refuse(found, of, data=True)
    if content["epoch"] > settings["epochs"]:
        raise ValueError(
            f"epochs={settings['epochs']}: the checkpoint has {content['epoch']} behind it; that "
            "many or more are allowed"
        )


def not_resumable(before: dict, now: dict) -> list[str]:
    """Differences that forbid to go on; the device is none, nor is the number of epochs.

    Under ``schedule="cosine"`` it is: the learning rate of each step depends on it.
    """
    return differences(before, now, *["epochs"] * (now["schedule"] == "constant"))


def differences(before: dict, now: dict, *ignored: str) -> list[str]:
    """Settings that differ, but for the device, in words; ``"auto"`` is any batch."""
    return [
        f"{key}={before.get(key)!r} (now {value!r})"
        for key, value in now.items()
        if before.get(key) != value
        and key not in ("device", *ignored)
        and (key, value) != ("batch_size", "auto")
    ]


def _refuse(found: list[str], what: str, data: bool = False) -> None:
    """Raise a ValueError if settings differ, or the data do, with which no run goes on."""
    remedies = (
        "or another run_dir" if data else "another run_dir, or its settings and resume='auto'"
    )
    if found:
        raise ValueError(
            f"{what} {', '.join(found)}; give overwrite=True to start anew, {remedies}"
        )


def _find_file(path: str | Path) -> Path:
    """The checkpoint at a path given for reading."""
    found = readable_path(path).resolve()
    if found.is_file():
        return found
    raise ValueError(f"resume={str(path)!r}: there is no such checkpoint; 'auto' finds the newest")


def stage(folder: Path) -> str | None:
    """ "finished", "unfinished", or None where there is no run and nothing else either."""
    files = folder.iterdir() if folder.is_dir() else ()
    begun = (f"{SETTINGS}.part", f"{checkpoints.FOLDER}.part")  # stopped while writing the first
    if all(path.name in begun for path in files):
        return None
    if not (folder / SETTINGS).exists():
        raise ValueError(f"run_dir={str(folder)!r}: holds files but no run; give another run_dir")
    try:
        finished = read_json(folder / RESULTS).get("finished")
    except (FileNotFoundError, ValueError):  # damaged: nothing says that the run is finished
        finished = False
    return "finished" if finished else "unfinished"
