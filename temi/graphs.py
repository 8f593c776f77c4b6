"""Training steps on a GPU as one CUDA graph: recorded once, then launched whole."""

import torch
from torch import Tensor

from temi.config import TrainConfig
from temi.steps import TrainState, training_step


class RecordedStep:
    """:func:`temi.steps.training_step` of one state, for a GPU that is faster than Python.

    A step is some three hundred kernels, and a large GPU has done each before Python has launched
    the next. So the first step runs as it is, which makes the optimiser's moments; the second is
    recorded, which runs nothing; it and all later ones are launched as one graph. What differs
    between steps (rows, learning rate, temperature) is copied to where the graph reads it. The
    kernels are the same, and so are the results.

    A graph reads and writes fixed places in memory. Where the state gets other tensors, or other
    parameters that are trained, another ``RecordedStep`` is needed.

    Parameters
    ----------
    state : TrainState
        On a GPU.
    config : TrainConfig
    """

    def __init__(self, state: TrainState, config: TrainConfig):
        self.state, self.config = state, config
        self.frozen = not state.student.gain.requires_grad
        self.rate, self.temperature = state.marginal.new_zeros(2).unbind()
        self.views: Tensor | None = None  # (G * B, D)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, views: Tensor, learning_rate: float, teacher_temp: float) -> Tensor:
        """Do a step; see :func:`temi.steps.training_step`. The next one overwrites the losses."""
        self.rate.fill_(learning_rate)
        self.temperature.fill_(teacher_temp)
        if self.views is None:
            self.views = views.clone()
            losses = self._step()
        else:
            self.views.copy_(views)
            if self.graph is None:
                self._record()
            self.graph.replay()
            losses = self.losses
            self.state.finite = self.finite.clone()  # is looked at after several steps
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate  # as after any other step
        return losses

    def _record(self) -> None:
        self.graph, marginal = torch.cuda.CUDAGraph(), self.state.marginal
        # "thread_local": another thread may be bringing a checkpoint to the CPU
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.losses = self._step()
            marginal.copy_(self.state.marginal)
        self.state.marginal, self.finite = marginal, self.state.finite

    def _step(self) -> Tensor:
        groups = self.state.optimizer.param_groups
        for group in groups:
            group["capturable"] = True
        losses = training_step(self.state, self.views, self.config, self.rate, self.temperature)
        for group in groups:
            group["capturable"] = False
        return losses
