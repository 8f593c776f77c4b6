"""All that a training is between two steps, which is what a checkpoint holds."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from temi.config import TrainConfig
from temi.ensemble import head_labels
from temi.graphs import RecordedStep
from temi.heads import MultiHead
from temi.rows import Rows
from temi.runs import Run
from temi.steps import TrainState, learning_rate_at, training_step


class Training:
    """A training between two steps, with all that the next one depends on.

    Attributes
    ----------
    epoch, step : int
        Whole epochs, and steps of the next one, that have been done.
    random : Tensor
        State of the random numbers at the start of the epoch.
    labels : Tensor [H, N], of the dtype of :func:`temi.ensemble.head_labels`
        Each head's own cluster of each image when it was last an anchor.
    losses : Tensor [H]
        Summed over the epoch's steps so far, as is ``gradient_norm`` [].
    seconds : float
        Spent on these steps.
    history : list of dict
        What :class:`temi.Run` has, before labels score it.
    retries : list of dict
        As in :class:`temi.Run`.
    """

    CHANGING = ("epoch", "step", "random", "labels", "losses", "gradient_norm", "seconds",
                "history", "retries")  # fmt: skip

    def __init__(self, x: Tensor | Rows, neighbors: Tensor | np.ndarray, config: TrainConfig,
                 identity: dict, log_every: int, record_steps: bool = False):  # fmt: skip
        self.x, self.neighbors, self.config, self.identity = x, neighbors, config, identity
        self.log_every, self.record_steps = log_every, record_steps
        self.retries = []
        self.start()

    def start(self) -> None:
        """Go to the state before the first step."""
        config, device = self.config, self.x.device
        generator = torch.Generator().manual_seed(config.seed)
        shape = (self.x.shape[1], config.num_clusters, config.num_heads)
        student = MultiHead(*shape, generator=generator).to(device)
        self.state = TrainState.start(student, config.weight_decay)
        self.recorded: RecordedStep | None = None
        self.labels = torch.from_numpy(head_labels(self.state.teacher, self.x)).to(device)
        self.history, self.epoch = [], 0
        self.start_epoch(generator)

    def start_epoch(self, generator: torch.Generator) -> None:
        """Go on to the next epoch, whose pairs the generator's state decides."""
        self.random, self.step, self.seconds = generator.get_state(), 0, 0.0
        self.losses = torch.zeros_like(self.state.marginal[:, 0])
        self.gradient_norm = torch.zeros_like(self.losses[0])

    def capture(self) -> dict:
        """A copy of everything, which later steps do not change: what a checkpoint holds."""
        progress = {name: getattr(self, name) for name in self.CHANGING}
        return self.identity | self.state.capture() | copy.deepcopy(progress)

    def restore(self, content: dict) -> None:
        """Go to a state that was captured, and leave the copy as it is."""
        self.state.restore(content)
        self.recorded = None
        for name in self.CHANGING:
            value = copy.deepcopy(content[name])
            on_device = isinstance(value, Tensor) and name != "random"
            setattr(self, name, value.to(self.x.device) if on_device else value)

    def step_of_epoch(self) -> Callable[[Tensor, float, float], Tensor]:
        """What does a step of this epoch, given its rows, learning rate and teacher temperature.

        In the first epoch the student's last layer stands still.
        """
        frozen = self.epoch == 0
        self.state.freeze_last_layer(frozen)
        if not self.record_steps:
            return lambda views, *rates: training_step(self.state, views, self.config, *rates)
        if self.recorded is None or self.recorded.frozen != frozen:
            self.recorded = RecordedStep(self.state, self.config)
        return self.recorded

    def learning_rate(self, number: int, steps_per_epoch: int) -> float:
        """Learning rate of a step (from 0, over all epochs), a tenth for each retry."""
        rate = learning_rate_at(number, steps_per_epoch, self.config)
        return rate * 10.0 ** -len(self.retries)

    def run_now(self, seconds: dict[str, float], exact: bool) -> Run:
        """The run as it stands; ``exact`` asks the teachers anew about all images."""
        if exact:
            self.labels = torch.from_numpy(head_labels(self.state.teacher, self.x))
            self.labels = self.labels.to(self.x.device)
        mean, axes = self.identity["mean"].numpy(), self.identity["axes"]
        return Run.from_heads(
            self.config,
            self.identity["manifest"],
            self.state.teacher,
            mean,
            None if axes is None else axes.numpy(),
            self.labels.cpu().numpy(),
            self.history,
            self.retries,
            seconds,
        )

    def cluster_sizes(self) -> Tensor:
        """Images in each cluster of each head [H, K], as :attr:`labels` has them."""
        clusters = self.state.marginal.shape[1]
        return torch.stack([labels.bincount(minlength=clusters) for labels in self.labels])
