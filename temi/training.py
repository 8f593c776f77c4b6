"""The training loop: a student, a teacher that follows it, and pairs of neighbours."""

import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from temi.config import TrainConfig
from temi.data import ImageSet
from temi.devices import half_precision, resolve_device
from temi.embeddings import Features, check_embeddings, mean_embedding, normalize
from temi.ensemble import align_heads, head_labels, relabel, vote
from temi.heads import MultiHead
from temi.losses import temi_loss
from temi.metrics import cluster_accuracy
from temi.neighbors import nearest_neighbors
from temi.runs import Run, check_run_dir, run_settings, save_run


@dataclass
class TrainState:
    """Everything that a training step changes."""

    student: MultiHead
    teacher: MultiHead
    marginal: Tensor  # (H, K)
    optimizer: torch.optim.Optimizer

    @classmethod
    def start(cls, student: MultiHead, weight_decay: float) -> "TrainState":
        """State before the first step: the teacher a copy of the student, uniform marginals."""
        gain = student.gain.detach()[..., 0]  # (H, K)
        return cls(
            student=student,
            teacher=copy.deepcopy(student).requires_grad_(False),
            marginal=torch.full_like(gain, 1 / gain.shape[1]),
            optimizer=torch.optim.AdamW(student.parameter_groups(weight_decay)),
        )


def training_step(
    state: TrainState,
    views: Tensor,
    config: TrainConfig,
    learning_rate: float,
) -> Tensor:
    """One step: marginals, loss, gradient, optimiser, teacher, in this order.

    Parameters
    ----------
    state : TrainState
        Changed in place.
    views : Tensor [2B, D]
        Rows 0 .. B-1 are the anchors, rows B .. 2B-1 their neighbours.
    config : TrainConfig
    learning_rate : float
        Of this step.

    Returns
    -------
    Tensor [H]
        Loss of each head before the step, detached.
    """
    with half_precision(config.precision, views.device):
        student_logits = state.student(views)  # (H, 2B, K)
        with torch.no_grad():
            teacher_logits = state.teacher(views)  # (H, 2B, K)
    head_losses, state.marginal = temi_loss(
        student_logits,
        teacher_logits,
        state.marginal,
        beta=config.beta,
        student_temp=config.student_temp,
        teacher_temp=config.teacher_temp,
        loss=config.loss,
    )
    state.optimizer.zero_grad()
    head_losses.mean().backward()
    if config.clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(state.student.parameters(), config.clip_grad)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    follow = get_ema_multi_avg_fn(config.teacher_momentum)
    follow(list(state.teacher.parameters()), list(state.student.parameters()), None)
    return head_losses.detach()


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


def draw_pairs(neighbors: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """One epoch's pairs: each image once as anchor, with one of its neighbours at random.

    The images left over after the last whole batch are skipped; other ones in each epoch.

    Parameters
    ----------
    neighbors : Tensor [N, k], int64
    batch_size : int
        B.
    generator : torch.Generator
        On the CPU, so that every device draws the same pairs.

    Returns
    -------
    Tensor [steps, 2B], int64
        In each row B anchors, then their neighbours.
    """
    images, k = neighbors.shape
    steps = images // batch_size
    anchors = torch.randperm(images, generator=generator)[: steps * batch_size]
    choice = torch.randint(k, anchors.shape, generator=generator)
    anchors, choice = anchors.to(neighbors.device), choice.to(neighbors.device)
    partners = neighbors[anchors, choice]
    return torch.cat([anchors.view(steps, -1), partners.view(steps, -1)], dim=1)


def train(
    features: Features | np.ndarray,
    config: TrainConfig,
    *,
    images: ImageSet | None = None,
    run_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Run:
    """Train an ensemble of clustering heads on embeddings.

    Parameters
    ----------
    features : Features or ndarray [N, D]
        float16, float32 or float64; used in float32. Labels that come with them score, no more.
    config : TrainConfig
    images : ImageSet, optional
        For the pictures of the clusters in the record.
    run_dir : path, optional
        Where :func:`temi.save_run` writes the record; nothing is written when None.
    overwrite : bool
        Whether a run of other settings in ``run_dir`` may be replaced, once this one is done.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        Before any work, if the embeddings are not finite rows [N, D], if clusters, neighbours or
        batch do not fit their number, or if ``run_dir`` holds something else.
    FloatingPointError
        If a head's loss is no longer finite.
    """
    if not isinstance(features, Features):
        features = Features.from_array(features)
    check_embeddings(features.x)
    config = config.resolve(len(features), features.num_classes)
    device = resolve_device(config.device)
    if run_dir is not None:
        run_dir = Path(run_dir)
        settings = run_settings(features.dataset, features.backbone, config)
        check_run_dir(run_dir, settings, overwrite)

    clock = time.perf_counter()
    mean = mean_embedding(features.x, config.normalize)
    x = torch.from_numpy(normalize(features.x, config.normalize, mean)).to(device)  # (N, D)
    neighbors, _ = nearest_neighbors(x, config.num_neighbors)  # (N, k)
    seconds = {"neighbors": time.perf_counter() - clock}

    generator = torch.Generator().manual_seed(config.seed)
    student = MultiHead(x.shape[1], config.num_clusters, config.num_heads, generator=generator)
    state = TrainState.start(student.to(device), config.weight_decay)
    history = []
    bar = tqdm(
        range(config.epochs), "training", unit="epoch", file=sys.stdout, disable=not progress
    )
    for epoch in bar:
        pairs = draw_pairs(neighbors, config.batch_size, generator)  # (steps, 2B)
        history.append(train_epoch(state, x, pairs, epoch, config))
        if features.labels is not None:
            head_losses = history[-1]["head_losses"]
            history[-1] |= _accuracies(state.teacher, x, head_losses, features.labels)
    seconds["training"] = sum(entry["seconds"] for entry in history)

    head_losses = np.array(history[-1]["head_losses"])
    consensus = _consensus(state.teacher, x, head_losses)
    run = Run(config, state.teacher, mean, head_losses, *consensus, history, seconds)
    if run_dir is not None:
        save_run(run, run_dir, features, images)
    return run


def train_epoch(
    state: TrainState, x: Tensor, pairs: Tensor, epoch: int, config: TrainConfig
) -> dict:
    """All steps of one epoch.

    Parameters
    ----------
    state : TrainState
        Changed in place.
    x : Tensor [N, D]
    pairs : Tensor [steps, 2B]
        From :func:`draw_pairs`.
    epoch : int
        From 0. In the first, the last layer of each head stays as it is.
    config : TrainConfig

    Returns
    -------
    dict
        ``epoch`` (from 1), ``head_losses`` (means over the steps), ``learning_rate`` of the last
        step, ``marginal_entropy`` in nats (mean over heads), ``seconds``.
    """
    clock = time.perf_counter()
    state.student.freeze_last_layer(epoch == 0)
    losses = torch.zeros_like(state.marginal[:, 0])  # (H); on the device, read once an epoch
    for step, index in enumerate(pairs):
        rate = learning_rate_at(epoch * len(pairs) + step, len(pairs), config)
        losses += training_step(state, x[index], config, rate)
    losses /= len(pairs)
    if not losses.isfinite().all():
        raise FloatingPointError(
            f"epoch {epoch + 1}: the loss of head {int(losses.isfinite().int().argmin())} is not "
            f"finite; learning_rate={config.learning_rate} may be too high"
        )
    return {
        "epoch": epoch + 1,
        "head_losses": losses.tolist(),
        "learning_rate": rate,
        "marginal_entropy": float(torch.special.entr(state.marginal).sum(dim=-1).mean()),
        "seconds": time.perf_counter() - clock,
    }


def _consensus(teacher: MultiHead, x: Tensor, head_losses: np.ndarray) -> tuple[np.ndarray, ...]:
    """Alignment, aligned head labels, voted labels and agreement."""
    labels, clusters, best = head_labels(teacher, x), teacher.gain.shape[1], head_losses.argmin()
    alignment = align_heads(labels, clusters, best)
    aligned = relabel(labels, alignment)
    return alignment, aligned, *vote(aligned, clusters, best)


def _accuracies(
    teacher: MultiHead, x: Tensor, head_losses: list[float], classes: np.ndarray
) -> dict[str, float]:
    """Accuracies after an epoch, for the history alone."""
    _, aligned, voted, _ = _consensus(teacher, x, np.array(head_losses))
    accuracies = [cluster_accuracy(labels, classes) for labels in aligned]
    return {
        "mean_head_acc": float(np.mean(accuracies)),
        "best_head_acc": accuracies[int(np.argmin(head_losses))],
        "ensemble_acc": cluster_accuracy(voted, classes),
    }
