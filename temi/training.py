"""The training loop, which stops and goes on at any step, and says early when it goes wrong."""

import dataclasses
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from temi import distributed
from temi.config import RunOptions, TrainConfig
from temi.data import ImageSet
from temi.devices import is_out_of_memory, resolve_device
from temi.embeddings import (
    Features,
    check_embeddings,
    check_images,
    checksum,
    mean_embedding,
    principal_axes,
)
from temi.neighbors import check_neighbors, mutual_neighbors, search_neighbors
from temi.records import Record
from temi.results import accuracies, run_settings
from temi.rows import Rows, choose_place, prepared_rows, rows_per_block
from temi.rundirs import Place, check_origin, check_outside, check_resumable, find_place
from temi.runs import Run
from temi.state import Training
from temi.steps import draw_pairs, teacher_temp_at
from temi.trouble import (
    DivergenceError,
    Signals,
    auto_batch,
    check_learned,
    collapsed_heads,
    what_fits,
)

RETRIES = 5
LARGE = 10**8  # numbers of all embeddings, which some seconds are needed to prepare


def train(
    features: Features | np.ndarray,
    config: TrainConfig,
    *,
    neighbors: np.ndarray | None = None,
    images: ImageSet | None = None,
    run_dir: str | Path | None = None,
    progress: bool = True,
    **options,
) -> Run:
    """Train an ensemble of clustering heads on embeddings.

    Under ``torchrun`` the processes share each batch, and the neighbour search, in equal parts: the
    training is that of one process, but for rounding. Rank 0 alone writes.

    Parameters
    ----------
    features : Features or ndarray [N, D]
        float16, float32 or float64; used in float32. Labels that come with them score, no more.
        Those of an array mapped from a file need not fit in memory, if neighbours are given: see
        ``keep_rows`` of :class:`temi.RunOptions`.
    config : TrainConfig
    neighbors : ndarray [N, k], int32 or int64, optional
        Row numbers of each embedding's neighbours, itself left out; may be mapped from a file.
        None: the ``num_neighbors`` nearest are searched, and of them the mutual ones kept where
        ``mutual_neighbors`` says so. Given ones are taken as they are.
    images : ImageSet, optional
        For the pictures of the clusters in the record.
    run_dir : path, optional
        Where the run is kept: settings, scores, clusters, checkpoints, logs. A relative one starts
        at the current folder; nothing is written when None.
    progress : bool
        Show a progress bar of the training. Trouble is said in any case, and what takes longer than
        two seconds before and after the training (search, labels, scores) shows its progress.
    **options
        ``resume``, ``overwrite``, ``on_divergence``, ``checkpoint_every``, ``keep_checkpoints``,
        ``best_by``, ``log_every``, ``keep_rows``, ``cuda_graph``, ``baseline``: see
        :class:`temi.RunOptions`.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        Before any work, if the embeddings are not finite rows [N, D] with a direction, if images,
        clusters, neighbours or batch do not fit their number, if several processes cannot share the
        batch equally, if ``run_dir`` lies among the images, holds something that would be lost or
        another process trains there, or if ``resume`` names no whole checkpoint of the same data
        and settings. More epochs are no other setting, where the schedule is constant. What would
        be lost is an unfinished run, and a finished one of other settings, embeddings or given
        neighbours.
    temi.trouble.DivergenceError
        A FloatingPointError: a loss or gradient is not finite, or clusters have collapsed, and
        ``on_divergence`` is "stop" or five retries did not help.
    temi.distributed.RankLostError
        A RuntimeError: another process of the same training has ended.
    MemoryError
        If a step does not fit into memory; says which batch would.
    KeyboardInterrupt
        After Ctrl-C, between two steps. As after every exception in a step, and SIGTERM, the state
        after the last complete step is in ``checkpoint_emergency.pth``.
    """
    options = RunOptions(**options)
    if not isinstance(features, Features):
        features = Features.from_array(features)
    check_embeddings(features.x)
    check_images(images, features)
    check_outside(run_dir, images)
    if options.best_by == "accuracy" and features.labels is None:
        raise ValueError("best_by='accuracy': these embeddings have no labels; 'loss' is allowed")
    given = None if neighbors is None else check_neighbors(neighbors, len(features))
    width = None if neighbors is None else neighbors.shape[1]
    config = config.resolve(len(features), features.num_classes, width)
    device = resolve_device(config.device)
    choice = (options.keep_rows, features.x, config.pca_dim, device, width is None)
    where = distributed.from_first(partial(choose_place, *choice))
    settings = run_settings(features.dataset, features.backbone, config)
    fingerprint = checksum(features.x)
    place, resumed = distributed.from_first(partial(_open, run_dir, settings, options))
    check_replaced(place, options, features.manifest, given)
    if resumed:
        check_resumable(resumed[1], settings, fingerprint, given)
        config = dataclasses.replace(config, batch_size=resumed[1]["config"]["batch_size"])
    if config.batch_size != "auto":
        distributed.check_divides(config.batch_size)

    clock = time.perf_counter()
    show_preparation(features.x, progress)
    mean = mean_embedding(features.x, config.normalize)
    if resumed:
        axes = resumed[1]["axes"]  # another machine's may point the other way
    else:
        search = partial(principal_axes, features.x, mean, config.pca_dim or features.x.shape[1])
        axes = distributed.from_first(search)
        axes = None if axes is None else torch.from_numpy(axes)
    block = rows_per_block(features.x) if where == "file" else None
    if resumed:
        block = resumed[1].get("block")  # the order of the run that goes on
    x = prepared_rows(
        features.x, config.normalize, mean, None if axes is None else axes.numpy(),
        device, where, block, config.group_size,
    )  # fmt: skip
    # (N, D), or (N, P) with P principal components
    if config.batch_size == "auto":
        config = dataclasses.replace(config, batch_size=auto_batch(config, x))
    settings["batch_size"] = config.batch_size
    if neighbors is None:
        whole = x.read(slice(None)) if isinstance(x, Rows) else x
        neighbors, _ = search_neighbors(whole, config.num_neighbors)  # (N, k)
        if config.mutual_neighbors:
            neighbors = mutual_neighbors(neighbors)
    seconds = {"neighbors": time.perf_counter() - clock}

    identity: dict[str, Any] = {"config": settings, "fingerprint": fingerprint}
    identity |= {"manifest": features.manifest, "mean": torch.from_numpy(mean), "axes": axes}
    identity |= {"neighbors": given, "block": block}
    record_steps = options.cuda_graph and device.type == "cuda" and distributed.count() == 1
    training = Training(x, neighbors, config, identity, options.log_every, record_steps)
    if resumed:
        training.restore(resumed[1])
    good, run = training.capture(), None  # the last good state; the run as it stands
    bar = tqdm(
        total=config.epochs, desc="training", unit="epoch", file=sys.stdout,
        disable=not (progress and distributed.is_first()),
    )  # fmt: skip
    if not distributed.is_first():
        place = Place(None, None, None)  # which writes nothing
    with Record(place, settings, options, resumed) as record:
        record.show_steps(bar, len(features) // int(config.batch_size))
        with Signals() as signals, bar:
            while training.epoch < config.epochs:
                bar.update(training.epoch - bar.n)
                try:
                    whole = run_epoch(training, signals, record.log_step)
                except DivergenceError as error:
                    if options.on_divergence == "stop" or len(training.retries) == RETRIES:
                        steps = good["step"] if error.collapse else training.step
                        save = partial(record.emergency, rewind, training, good, steps)
                        distributed.from_first(save)
                        raise
                    tqdm.write(f"{error}; trying again", file=sys.stdout)
                    retry(training, good, error)
                    good = training.capture()
                    continue
                except BaseException as error:
                    if distributed.is_lost(error):  # the last checkpoint is what all of them had
                        raise distributed.RankLostError from error
                    record.emergency(rewind, training, good, training.step)
                    if is_out_of_memory(error):
                        traceback.clear_frames(error.__traceback__)  # they hold its tensors
                        raise MemoryError(what_fits(config, x)) from error
                    raise
                if not whole:
                    distributed.from_first(partial(record.emergency, training.capture))
                    record.close()
                    signals.act()
                last = training.epoch == config.epochs
                run = training.run_now(seconds, exact=last)
                if features.labels is not None:
                    training.history[-1] |= accuracies(run, features.labels)
                good = training.capture()
                record.epoch(good, run, features, training.cluster_sizes())
            bar.update(training.epoch - bar.n)
            if distributed.any_of(signals.received is not None):
                record.close()
                signals.act()
        if run is None:  # nothing was left to train
            run = training.run_now(seconds, exact=True)
        distributed.from_first(partial(record.finish, run, features, images))
    check_learned(run.head_losses, config)
    return run


def show_preparation(x: np.ndarray, progress: bool) -> None:
    """Say that mean, axes and rows of embeddings [N, D] come first, if they take long."""
    if progress and distributed.is_first() and x.size >= LARGE:
        tqdm.write(f"preparing {len(x)} rows of {x.shape[1]} numbers", file=sys.stdout)


def _open(
    run_dir: str | Path | None, settings: dict, options: RunOptions
) -> tuple[Place, tuple[Path, dict] | None]:
    """Where a run may grow, and the checkpoint that it goes on from."""
    place = find_place(run_dir, settings, options)
    return place, place.load()


def check_replaced(
    place: Place, options: RunOptions, manifest: dict, neighbors: str | None
) -> None:
    """:func:`temi.rundirs.check_origin`, by the first rank for all."""
    distributed.from_first(partial(check_origin, place, options, manifest, neighbors))


def run_epoch(
    training: Training,
    signals: Signals | None = None,
    log: Callable | None = None,
    until: int | None = None,
) -> bool:
    """Do the steps of an epoch that are not done yet.

    Parameters
    ----------
    training : Training
        Changed in place.
    signals : Signals, optional
        Asked before each step.
    log : callable, optional
        Given a step's number, losses [H], gradient norm [] and learning rate, now and then.
    until : int, optional
        Steps of the epoch to stop at, its end not included.

    Returns
    -------
    bool
        Whether the epoch is whole; not after a signal, nor where ``until`` was given.

    Raises
    ------
    DivergenceError
        If a step was not finite, noticed at once on a CPU, every ``log_every`` steps on a GPU;
        or, after the epoch, if half of the heads have collapsed.
    """
    clock, config = time.perf_counter() - training.seconds, training.config
    generator = torch.Generator()
    generator.set_state(training.random)
    pairs = draw_pairs(
        training.neighbors,
        int(config.batch_size),
        generator,
        config.group_size,
        training.identity["block"],
    )  # (steps, G * B)
    if isinstance(training.x, Tensor):
        pairs = pairs.to(training.x.device)
    do_step = training.step_of_epoch()
    groups = pairs.unflatten(1, (config.group_size, -1))  # (steps, G, B)
    own = groups[:, :, distributed.share(int(config.batch_size))].flatten(1)  # this rank's part
    on_cpu = training.x.device.type == "cpu"
    finite = []  # of the steps since the last look
    for step in range(training.step, len(pairs) if until is None else until):
        if signals and distributed.any_of(signals.received is not None):
            training.seconds = time.perf_counter() - clock
            check_left(training, finite, len(pairs))
            return False
        number = training.epoch * len(pairs) + step
        rate = training.learning_rate(number, len(pairs))
        temperature = teacher_temp_at(number, len(pairs), config)
        views = training.x[own[step]]  # (G * B, D), of several ranks each its share of the B
        losses = do_step(views, rate, temperature)
        training.losses += losses
        training.gradient_norm += training.state.gradient_norm
        assigned = distributed.gather_rows(training.state.assigned.T, int(config.batch_size))
        training.labels[:, groups[step, 0]] = assigned.T.to(training.labels.dtype)
        training.step += 1
        finite.append(training.state.finite)
        logged = (number + 1) % training.log_every == 0
        if on_cpu or logged or training.step == len(pairs):
            _look(training, finite, number, rate)
            finite = []
        if log and logged:
            log(number, losses, training.state.gradient_norm, rate)
    if until is not None:
        return False
    _end_epoch(training, len(pairs), time.perf_counter() - clock)
    training.start_epoch(generator)
    return True


def _look(training: Training, finite: list[Tensor], number: int, rate: float) -> None:
    """Raise DivergenceError if one of the last steps, ``number`` the last, was masked."""
    masked = ~torch.stack(finite)  # (steps, H)
    if masked.any():
        first = int(masked.any(dim=1).int().argmax())
        heads = masked[first].nonzero().flatten().tolist()
        back = len(finite) - first  # steps since, that one included
        training.step -= back
        raise DivergenceError(training.epoch + 1, number + 1 - back, heads, rate)


def check_left(training: Training, finite: list[Tensor], steps: int) -> None:
    """Look at the steps since the last look, where an epoch of so many ends early."""
    if finite:
        number = training.epoch * steps + training.step - 1
        _look(training, finite, number, training.learning_rate(number, steps))


def _end_epoch(training: Training, steps: int, seconds: float) -> None:
    """Look for collapsed heads and write the history."""
    rate = training.learning_rate((training.epoch + 1) * steps - 1, steps)
    collapsed = collapsed_heads(training.state.marginal, training.cluster_sizes())
    if 2 * len(collapsed) >= len(training.losses):
        raise DivergenceError(training.epoch + 1, None, collapsed, rate)
    if collapsed and (not training.history or training.history[-1]["collapsed_heads"] != collapsed):
        said = f"epoch {training.epoch + 1}: the clusters of heads {collapsed} collapsed"
        tqdm.write(said, file=sys.stdout)
    entropy = torch.special.entr(training.state.marginal).sum(dim=-1)  # (H)
    training.history.append(
        {
            "epoch": training.epoch + 1,
            "head_losses": (training.losses / steps).tolist(),
            "learning_rate": rate,
            "marginal_entropy": float(entropy.mean()),
            "gradient_norm": float(training.gradient_norm / steps),
            "collapsed_heads": collapsed,
            "seconds": seconds,
        }
    )
    training.epoch += 1


def rewind(training: Training, good: dict, steps: int) -> dict:
    """What a checkpoint holds after so many steps of the epoch, whatever was half done since.

    The steps are done again from ``good``, an earlier state of the same epoch. Where that fails
    too, ``good`` itself is returned.
    """
    try:
        training.restore(good)
        with distributed.alone():
            run_epoch(training, until=steps)
        for of_steps in (training.losses, training.gradient_norm):  # not looked at on a GPU
            if not of_steps.isfinite().all():
                raise FloatingPointError("a step was not finite")
        return training.capture()
    except Exception as error:
        back = f"the state goes back to step {good['step']} of the epoch: {error}"
        tqdm.write(back, file=sys.stdout)
        return good


def retry(training: Training, good: dict, error: DivergenceError) -> None:
    """Go back to the last good state, with a tenth of the learning rate from there on.

    That state is the start where clusters collapsed, as none can tell since when it was coming,
    and where ``good`` led to a bad step at once.
    """
    retries = [*training.retries, error.entry]
    if error.collapse or training.step == good["step"]:
        training.start()
    else:
        training.restore(good)
    training.retries = retries
