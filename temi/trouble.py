"""What can go wrong in a training, seen early and said in one line."""

import math
import signal
import threading
import traceback
import warnings

import numpy as np
import torch
from torch import Tensor

from temi import distributed
from temi.config import RECIPES, TrainConfig
from temi.devices import is_out_of_memory
from temi.heads import MultiHead
from temi.rows import Rows
from temi.steps import TrainState, training_step


class DivergenceError(FloatingPointError):
    """A training that leads nowhere: a step that is not finite, or clusters that collapsed.

    Parameters
    ----------
    epoch : int
        From 1.
    step : int or None
        From 0, over all epochs; None says that the clusters collapsed.
    heads : list of int
    learning_rate : float

    Attributes
    ----------
    collapse : bool
    entry : dict
        The parameters, with ``reason``: "not finite" or "collapse".
    """

    def __init__(self, epoch: int, step: int | None, heads: list[int], learning_rate: float):
        self.collapse = step is None
        self.entry = {
            "epoch": epoch,
            "step": step,
            "heads": heads,
            "learning_rate": learning_rate,
            "reason": "collapse" if self.collapse else "not finite",
        }
        who = f"head{'s' * (len(heads) > 1)} {', '.join(map(str, heads))}"
        what = (
            f"epoch {epoch}: the clusters of {who} collapsed"
            if self.collapse
            else f"epoch {epoch}, step {step} (from 0): the loss or gradient of {who} is not finite"
        )
        super().__init__(
            f"{what}, at learning rate {learning_rate:g}; what usually helps: a tenth of "
            "learning_rate (on_divergence='retry' does that), more warmup_epochs, clip_grad=1.0"
        )

    def __reduce__(self):  # by default the message alone goes to __init__
        names = ("epoch", "step", "heads", "learning_rate")
        return type(self), tuple(self.entry[name] for name in names)


def collapsed_heads(marginal: Tensor, sizes: Tensor) -> list[int]:
    """Heads whose clusters have collapsed.

    A cluster is lost when it has less than a tenth of its equal share of the images. A head has
    collapsed when its marginal entropy is under a tenth of log K; or when half of its clusters are
    lost, or more, while the entropy is under nine tenths of log K. Above that the teacher has not
    made up its mind: an untrained head calls most images after a few clusters, by a hair.

    Parameters
    ----------
    marginal : Tensor [H, K]
    sizes : Tensor [H, K], int64
        Images in each cluster of each head.

    Returns
    -------
    list of int
    """
    share = torch.special.entr(marginal).sum(dim=-1) / math.log(marginal.shape[1])  # (H)
    images, clusters = sizes[0].sum(), sizes.shape[1]
    lost = (sizes * clusters * 10 < images).sum(dim=-1)  # (H)
    collapsed = (share < 0.1) | ((2 * lost >= clusters) & (share < 0.9))
    return collapsed.nonzero().flatten().tolist()


def check_learned(head_losses: np.ndarray, config: TrainConfig) -> None:
    """Warn, once of several processes, if the heads end with all clusters equally likely.

    Of such heads the losses ``"temi"`` and ``"wmi"`` are -(2 - 2 beta) log(K) / K, of any that tell
    images apart far lower. :func:`collapsed_heads` does not see it, as the marginal is level.
    Around equal probabilities the loss falls as logits grow only if those of neighbours correlate
    by more than (1 - beta) / beta, which is 2/3 at 0.6 (second-order terms of the loss); where
    neighbours are less alike, and the heads do not learn to see them alike first, all go to equal.

    Parameters
    ----------
    head_losses : ndarray [H]
        Means over the last epoch.
    config : TrainConfig
        Resolved.
    """
    if config.loss not in ("temi", "wmi") or not distributed.is_first():
        return
    clusters = config.num_clusters
    equal = -(2 - 2 * config.beta) * math.log(clusters) / clusters
    if head_losses.mean() > 1.05 * equal:
        warnings.warn(
            f"the heads hardly tell images apart (mean loss {head_losses.mean():.3g}, "
            f"{equal:.3g} if all clusters are equally likely); what usually helps: beta=0.7 with "
            "teacher_momentum=0.99, more epochs, another backbone",
            stacklevel=3,
        )


class Signals:
    """Within this context, Ctrl-C and SIGTERM wait until they are asked for, between two steps.

    A second one does not wait. Outside the main thread, where Python hands out no signals, nothing
    changes.
    """

    received: int | None

    def __enter__(self) -> "Signals":
        self.received, self._before = None, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def act(self) -> None:
        """Do what the signal does without this context; stop in any case.

        Where another process of the same run received it, and this one did not, too.
        """
        self.__exit__()
        if self.received is not None:
            signal.raise_signal(self.received)
        raise KeyboardInterrupt


def fitting_batch(config: TrainConfig, x: Tensor | Rows, largest: int) -> int:
    """``largest`` pairs or its half, quarter …: the first with which a step fits into memory.

    Tried on embeddings ``x`` [N, D] with heads that are thrown away, without other processes. 0 if
    not even one pair fits.
    """
    batch = largest
    while batch:
        try:
            heads = MultiHead(x.shape[1], config.num_clusters, config.num_heads).to(x.device)
            rows = torch.arange(config.group_size * batch, device=x.device)
            views = x[rows % len(x)]  # (G * B, D)
            with distributed.alone():
                training_step(TrainState.start(heads, 0.0), views, config, 0.0)
            break
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
        heads = views = None
        if x.device.type == "cuda":
            torch.cuda.empty_cache()
        batch //= 2
    return batch


def auto_batch(config: TrainConfig, x: Tensor | Rows) -> int:
    """What ``batch_size="auto"`` means: the recipe's, at most all images, halved until it fits.

    Of several processes, each takes its part of it; what fits is tried by the first.
    """
    parts = distributed.count()
    largest = min(len(x), RECIPES[config.recipe]["batch_size"]) // parts
    batch = distributed.from_first(lambda: fitting_batch(config, x, max(1, largest)))
    if not batch:
        raise MemoryError(f"batch_size='auto': not even one pair fits into memory on {x.device}")
    return batch * parts


def what_fits(config: TrainConfig, x: Tensor | Rows) -> str:
    """What is said when a step did not fit into memory."""
    parts = distributed.count()
    batch = parts * fitting_batch(config, x, int(config.batch_size) // parts // 2)
    remedy = f"{batch} fits now (batch_size='auto' finds it)" if batch else "nor does any other"
    return f"batch_size={config.batch_size}: a step does not fit in memory on {x.device}; {remedy}"
