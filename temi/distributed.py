"""Several processes that embed or train together: the one module that knows of ranks.

``torchrun`` starts the processes (ranks), on one machine or on several; the first call of a
function here joins them. Without it there is one rank, and each function gives back what it was
given, so that nothing else asks how many there are.

All ranks do the same, in the same order: a function here that speaks with the others returns when
all of them have called it.
"""

import atexit
import contextlib
import datetime
import functools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

PATIENCE = datetime.timedelta(hours=12)  # the others wait while rank 0 scores, say
TEXTS = ("closed by peer", "reset by peer", "Broken pipe", "gloo", "NCCL")  # of what torch raises
Made = TypeVar("Made")
_alone = False


class RankLostError(RuntimeError):
    """Another process of this run has ended, and so must this one."""

    def __init__(self):
        super().__init__(
            "a process of this run was ended, and the others with it; the same command goes on "
            "from what is on disk (a training with --resume auto, from its last checkpoint)"
        )


@functools.cache
def _meet() -> tuple[Any, int, int]:
    """Where the ranks leave each other notes, this one's number and theirs."""
    return next(distributed.rendezvous("env://"))


@functools.cache
def _join() -> tuple[int, int]:
    """Rank and number of ranks, once all of them are there."""
    if not distributed.is_torchelastic_launched():
        return 0, 1
    store, rank, count = _meet()
    store.add("here", 1)
    while store.add("here", 0) < count:  # in Python, where a signal is heard
        time.sleep(0.05)
    if torch.cuda.is_available():  # "cuda" is each rank's own from here on
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # gloo for tensors on the CPU, NCCL for those on a GPU
    distributed.init_process_group(store=store, rank=rank, world_size=count, timeout=PATIENCE)
    atexit.register(distributed.destroy_process_group)
    return rank, count


def rank() -> int:
    """This process's number, from 0."""
    return 0 if _alone else _join()[0]


def count() -> int:
    """The number of processes that work together; 1 without torchrun."""
    return 1 if _alone else processes()


def processes() -> int:
    """The number of processes of this run, even while one works alone."""
    return _join()[1]


def on_this_machine() -> int:
    """How many of these processes there are on this machine, sharing its memory and cores."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if processes() > 1 else 1


def is_first() -> bool:
    """Whether this is rank 0, which alone writes runs, and shows progress."""
    return rank() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within this context this rank works as if there were no other, and waits for none."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What torch raises when another rank is gone becomes a :class:`RankLostError`."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError from error


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone; a backward pass raises torch's own."""
    if isinstance(error, RankLostError):
        return True
    told = any(text in str(error) for text in TEXTS)
    return count() > 1 and isinstance(error, RuntimeError) and told


def share(length: int) -> slice:
    """This rank's part of so many rows; the parts follow each other in the order of the ranks."""
    part = -(-length // count())
    return slice(min(length, rank() * part), min(length, (rank() + 1) * part))


def check_divides(batch_size: int) -> None:
    """Raise a ValueError unless every rank can take an equal part of a batch."""
    if batch_size % count():
        more = -(-batch_size // count()) * count()
        raise ValueError(
            f"batch_size={batch_size}: {count()} processes share it equally, so a multiple of "
            f"{count()} is needed, such as {more}"
        )


def gather_rows(part: Tensor, length: int) -> Tensor:
    """All rows [length, ...], of which each rank has the part that :func:`share` names."""
    if count() == 1:
        return part
    size = -(-length // count())
    padded = part.new_zeros((size, *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(count())]
    with _together():
        distributed.all_gather(parts, padded)
    return torch.cat(parts)[:length]


class _Mean(torch.autograd.Function):
    """Mean over the ranks; the gradient of it is the mean over the ranks of the gradients."""

    @staticmethod
    def forward(_, values: Tensor) -> Tensor:
        total = values.clone()
        with _together():
            distributed.all_reduce(total)
        return total / count()

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return _Mean.apply(gradient)


def mean(values: Tensor) -> Tensor:
    """Mean over the ranks, through which gradients flow."""
    return values if count() == 1 else _Mean.apply(values)


def averaged(module: nn.Module) -> nn.Module:
    """The module; its gradients are averaged over the ranks in every backward pass."""
    if count() == 1:
        return module
    with _together():
        return DistributedDataParallel(module)


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank, so that all of them act upon it at the same time."""
    if count() == 1:
        return flag
    flags = torch.tensor(int(flag))
    with _together():
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)


def wait_for_all() -> None:
    """Return when every rank has come this far."""
    any_of(False)


def from_first(make: Callable[[], Made]) -> Made:
    """What ``make`` gives on rank 0, on every rank; or the exception that it raises there.

    The others wait meanwhile: ``make`` works alone.
    """
    if count() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            with alone():
                outcome[0] = make()
        except RankLostError:
            raise
        except Exception as error:
            outcome[1] = error
    with _together():
        distributed.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def first_ahead(make: Callable[[], Made]) -> Made:
    """What ``make`` gives on each rank, rank 0 ahead of the others: what it downloads, it alone."""
    made: list[Made] = []
    from_first(lambda: made.append(make()))
    return made[0] if made else make()


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Within this context rank 0 alone prints and warns, and each notices the end of another.

    ``torchrun`` sends SIGTERM to the others when a rank ends early.
    """
    if not distributed.is_torchelastic_launched():
        yield
        return

    def leave(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RankLostError

    signal.signal(signal.SIGTERM, leave)
    with contextlib.ExitStack() as context:
        for number in (signal.SIGTERM, signal.SIGINT):  # once it is ending as it is
            context.callback(signal.signal, number, signal.SIG_IGN)
        if not is_first():
            nowhere = context.enter_context(open(os.devnull, "w"))
            context.enter_context(contextlib.redirect_stdout(nowhere))
            context.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield


def image_bar(total: int, desc: str, *, shown: bool = True, **options) -> tqdm:
    """A bar over images, shown by rank 0 alone once the work has taken two seconds."""
    return tqdm(
        total=total, desc=desc, unit="image", file=sys.stdout,
        disable=not (shown and is_first()), **{"delay": 2} | options,
    )  # fmt: skip


def say(message: str) -> None:
    """Print to stderr what ends the work; of several ranks, only the first that comes here."""
    with contextlib.suppress(RuntimeError):  # no store any more: said twice is better than never
        if distributed.is_torchelastic_launched() and _meet()[0].add("said", 1) > 1:
            return
    print(message, file=sys.stderr, flush=True)
