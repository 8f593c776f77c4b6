"""One training step and what it is given: networks, learning rate, temperature, pairs."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from temi import distributed
from temi.config import TrainConfig
from temi.devices import half_precision
from temi.heads import MultiHead
from temi.losses import temi_loss
from temi.rows import ask_for, block_order

DRAWN = 2**22  # random numbers in memory at a time: 16 MB


@dataclass
class TrainState:
    """The networks and all that a training step changes, and what it says of itself."""

    student: MultiHead
    averaged: nn.Module  # the student, its gradients averaged over the ranks
    teacher: MultiHead
    marginal: Tensor  # (H, K)
    optimizer: torch.optim.Optimizer
    follower: torch.optim.Optimizer  # moves the teacher towards the student
    finite: Tensor | None = None  # (H), bool: whether the last step was, for each head
    gradient_norm: Tensor | None = None  # () of the last step, before clipping
    assigned: Tensor | None = None  # (H, B) the teacher's clusters of the last step's anchors

    @classmethod
    def start(cls, student: MultiHead, weight_decay: float) -> "TrainState":
        """State before the first step: the teacher a copy of the student, uniform marginals."""
        gain = student.gain.detach()[..., 0]  # (H, K)
        teacher = copy.deepcopy(student).requires_grad_(False)
        for follows, leads in zip(teacher.parameters(), student.parameters(), strict=True):
            follows.grad = leads.detach()  # the same memory, so always the present student
        return cls(
            student=student,
            averaged=distributed.averaged(student),
            teacher=teacher,
            marginal=torch.full_like(gain, 1 / gain.shape[1]),
            optimizer=torch.optim.AdamW(student.parameter_groups(weight_decay), fused=True),
            # teacher - rate * (teacher - student): fused as the other, so that both can be told
            # on the device to leave everything as it is
            follower=torch.optim.SGD(
                teacher.parameters(), weight_decay=1.0, maximize=True, fused=True
            ),
        )

    def freeze_last_layer(self, frozen: bool) -> None:
        """Take the student's last layer out of training, or put it back."""
        self.student.freeze_last_layer(frozen)
        self.averaged = distributed.averaged(self.student)  # of what has gradients from here on

    def capture(self) -> dict:
        """A copy that later steps do not change, of tensors, numbers, texts, dicts and lists."""
        return copy.deepcopy(
            {
                "student": dict(self.student.state_dict()),
                "teacher": dict(self.teacher.state_dict()),
                "marginal": self.marginal,
                "optimizer": self.optimizer.state_dict(),
            }
        )

    def restore(self, captured: dict) -> None:
        """Go to a captured state, and leave the copy as it is."""
        self.student.load_state_dict(captured["student"])
        self.teacher.load_state_dict(captured["teacher"])
        self.marginal = captured["marginal"].to(self.marginal.device, copy=True)
        self.optimizer.load_state_dict(copy.deepcopy(captured["optimizer"]))


def training_step(
    state: TrainState,
    views: Tensor,
    config: TrainConfig,
    learning_rate: float | Tensor,
    teacher_temp: float | Tensor | None = None,
) -> Tensor:
    """One step: marginals, loss, gradient, optimiser, teacher, in this order.

    Where a loss, gradient or marginal is not finite, nothing changes but ``state.finite``. That is
    decided on the device: no step waits for the one before it to be read.

    Parameters
    ----------
    state : TrainState
        Changed in place.
    views : Tensor [G * B, D]
        Rows 0 .. B-1 are the anchors, each further B rows one neighbour of each; G is
        ``config.group_size``. Where several processes share a batch, this one's part.
    config : TrainConfig
    learning_rate : float or Tensor []
        Of this step.
    teacher_temp : float or Tensor [], optional
        Of this step; that of ``config`` when None.

    Returns
    -------
    Tensor [H]
        Loss of each head on the whole batch, before the step, detached.
    """
    with half_precision(config.precision, views.device):
        student_logits = state.averaged(views)  # (H, G * B, K)
        with torch.no_grad():
            teacher_logits = state.teacher(views)  # (H, G * B, K)
    head_losses, marginal = temi_loss(
        student_logits,
        teacher_logits,
        state.marginal,
        beta=config.beta,
        student_temp=config.student_temp,
        teacher_temp=config.teacher_temp if teacher_temp is None else teacher_temp,
        loss=config.loss,
        group_size=config.group_size,
    )
    state.optimizer.zero_grad()
    head_losses.mean().backward()
    head_losses = distributed.mean(head_losses.detach())

    gradients = [p.grad.flatten(1) for p in state.student.parameters() if p.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in gradients]).norm(dim=0)  # (H)
    known = marginal.isfinite().all(dim=-1)  # (H); a head's teacher spoils the loss of all heads
    finite = torch.where(known.all(), (head_losses + norms).isfinite(), known)  # (H)
    good, norm = finite.all(), norms.norm()

    unchanged = (~good).float()  # 1: change nothing
    state.optimizer.found_inf = state.follower.found_inf = unchanged  # type: ignore[attr-defined]
    if config.clip_grad is not None:  # gradients are divided by this
        scale = (norm / config.clip_grad).clamp_min(1).float()
        state.optimizer.grad_scale = scale  # type: ignore[attr-defined]
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    state.follower.param_groups[0]["lr"] = 1 - config.teacher_momentum
    state.follower.step()
    state.marginal = torch.where(good, marginal, state.marginal)
    state.finite, state.gradient_norm = finite, norm
    state.assigned = teacher_logits[:, : len(views) // config.group_size].argmax(dim=-1)
    return head_losses


def learning_rate_at(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Learning rate of a step (from 0): linear warm-up, then constant or half a cosine."""
    peak = config.learning_rate * config.batch_size / 256
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, config.epochs * steps_per_epoch - warmup)
    return peak * (1 + math.cos(math.pi * progress)) / 2


def teacher_temp_at(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Teacher temperature of a step (from 0): linear from its start, then constant."""
    if config.teacher_temp_start is None:
        return config.teacher_temp
    progress = min(1, step / (config.temp_warmup_epochs * steps_per_epoch))
    return config.teacher_temp_start + progress * (config.teacher_temp - config.teacher_temp_start)


def draw_pairs(
    neighbors: Tensor | np.ndarray,
    batch_size: int,
    generator: torch.Generator,
    group_size: int = 2,
    block: int | None = None,
) -> Tensor:
    """One epoch's groups: each image once as anchor, with other ones of its neighbours at random.

    The images left over after the last whole batch are skipped; other ones in each epoch.

    Parameters
    ----------
    neighbors : Tensor [N, k], int64, or ndarray, which may be mapped from a file
    batch_size : int
        B.
    generator : torch.Generator
        On the CPU, so that every device draws the same groups.
    group_size : int
        G, images in a group: 2 for pairs.
    block : int, optional
        Rows in a block of a file: the anchors come in the order of
        :func:`temi.rows.block_order`. None: in any order.

    Returns
    -------
    Tensor [steps, G * B], int64
        On the device of a Tensor, else on the CPU.
        In each row B anchors, then the first neighbour of each, then the second, ...
    """
    images, k = neighbors.shape
    steps = images // batch_size
    if block is None:
        anchors = torch.randperm(images, generator=generator)
    else:
        anchors = block_order(images, block, generator)
    device = neighbors.device if isinstance(neighbors, Tensor) else anchors.device
    groups = torch.empty(steps, group_size, batch_size, dtype=torch.int64, device=device)
    together = max(1, DRAWN // (batch_size * k))  # steps
    for start, part in enumerate(anchors[: steps * batch_size].split(together * batch_size)):
        order = torch.rand(len(part), k, generator=generator)
        choice = order.topk(group_size - 1).indices.to(device)  # (part, G - 1), all different
        if isinstance(neighbors, Tensor):
            part = part.to(device)
            chosen = neighbors.flatten()[part.unsqueeze(1) * k + choice]
        else:
            ask_for(neighbors, part.numpy())
            near = torch.from_numpy(neighbors[part.numpy()].astype(np.int64))  # (part, k)
            chosen = near.gather(1, choice)
        drawn = torch.cat([part.unsqueeze(1), chosen], dim=1).view(-1, batch_size, group_size)
        groups[start * together : (start + 1) * together] = drawn.transpose(1, 2)
    return groups.flatten(1)
