"""Several processes that embed or train together: the one module that knows of ranks.

``torchrun`` starts the processes (ranks), on one machine or on several; the first call of a
function here joins them. Without it there is one rank, and each function gives back what it was
given, so that nothing else asks how many there are.
"""

import atexit
import datetime
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = datetime.timedelta(hours=6)  # one rank may read or score while the others wait


class RankLostError(RuntimeError):
    """Another process of the same run has ended, so that this one cannot go on."""


@functools.cache
def join() -> tuple[int, int]:
    """This process's rank, from 0, and the number of ranks; joins the others the first time.

    Tensors on the CPU go through gloo and those on a GPU through NCCL; "cuda" then means each
    rank's own GPU.
    """
    if not distributed.is_torchelastic_launched():
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if not distributed.is_initialized():
        distributed.init_process_group(timeout=PATIENCE)
        atexit.register(distributed.destroy_process_group)
    return distributed.get_rank(), distributed.get_world_size()


def rank() -> int:
    """This process's number, from 0."""
    return join()[0]


def count() -> int:
    """The number of processes; 1 without torchrun."""
    return join()[1]


def local_count() -> int:
    """The number of processes on this machine, which share its cores."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if count() > 1 else 1


def is_first() -> bool:
    """Whether this is rank 0, which alone writes runs and shows progress."""
    return rank() == 0


def share(length: int) -> slice:
    """This rank's part of so many rows, one after the other in the order of the ranks."""
    part = -(-length // count())
    return slice(min(length, rank() * part), min(length, (rank() + 1) * part))


def gather_rows(part: Tensor, length: int) -> Tensor:
    """All rows [length, ...] of which each rank has the part that :func:`share` names."""
    if count() == 1:
        return part
    size = -(-length // count())
    padded = part.new_zeros((size, *part.shape[1:]))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(count())]
    distributed.all_gather(parts, padded)
    return torch.cat(parts)[:length]


class _Mean(torch.autograd.Function):
    """Mean over the ranks; its gradient is the mean of the ranks' gradients."""

    @staticmethod
    def forward(_, values: Tensor) -> Tensor:
        values = values.clone()
        distributed.all_reduce(values)
        return values / count()

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return _Mean.apply(gradient)


def mean(values: Tensor) -> Tensor:
    """Mean over the ranks, through which gradients flow."""
    return values if count() == 1 else _Mean.apply(values)


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank: what all of them then act upon."""
    if count() == 1:
        return flag
    flags = torch.tensor(int(flag))
    distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return bool(flags)


def wait_for_all() -> None:
    """Return when every rank has come this far."""
    any_of(False)


def from_first(make: Callable[[], Any]) -> Any:
    """What ``make`` gives on rank 0, on every rank; where it fails, the exception on every rank."""
    if count() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result


def averaged(module: nn.Module) -> nn.Module:
    """The module, its gradients averaged over the ranks in each backward pass."""
    if count() == 1:
        return module
    return DistributedDataParallel(module)


def first_to_say() -> bool:
    """Whether this rank is the first to ask: it then speaks for all of them."""
    if count() == 1:
        return True
    try:
        return distributed.distributed_c10d._get_default_store().add("said", 1) == 1
    except RuntimeError:  # the store went with its process: better said twice than not at all
        return True


def is_lost(error: BaseException) -> bool:
    """Whether an exception says that another rank has gone."""
    texts = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "Gloo", "gloo")
    return (
        count() > 1
        and isinstance(error, RuntimeError)
        and any(text in str(error) for text in texts)
    )
