"""TEMI as one would write it first: a module a head, a loop over heads, a data loader, fp32.

The baseline of ``time_to_accuracy.py``. It computes what ``temi.training`` computes (both are held
against the same reference numbers) and shares none of its code, so that the comparison is of two
ways to write the same method.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from temi.config import TrainConfig


class Head(nn.Module):
    """One projection head: embeddings [B, D] -> logits [B, K]."""

    def __init__(self, in_dim: int, num_clusters: int, hidden_dim=512, bottleneck_dim=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, bottleneck_dim)
        )
        last = nn.Linear(bottleneck_dim, num_clusters, bias=False)
        for layer in (self.mlp[0], self.mlp[2], last):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.last_layer = nn.utils.parametrizations.weight_norm(last)
        nn.init.ones_(self.gain)

    @property
    def gain(self) -> nn.Parameter:
        """Length of each cluster's weights [K, 1]."""
        return self.last_layer.parametrizations.weight.original0

    @property
    def direction(self) -> nn.Parameter:
        """Their direction [K, bottleneck]."""
        return self.last_layer.parametrizations.weight.original1

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Pairs(Dataset):
    """Each image with one of its neighbours, drawn anew at every visit."""

    def __init__(self, x: Tensor, neighbors: Tensor):
        self.x, self.neighbors = x, neighbors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        choice = torch.randint(self.neighbors.shape[1], ())
        return self.x[index], self.x[self.neighbors[index, choice]]


class PlainTemi:
    """Student and teacher heads in lists, and the training step that loops over them."""

    def __init__(self, students: list[Head], config: TrainConfig, device: str = "cpu"):
        self.config, self.device = config, device
        self.students = nn.ModuleList(students).to(device)
        self.teachers = copy.deepcopy(self.students).requires_grad_(False)
        clusters = config.num_clusters
        self.marginals = [torch.full_like(head.gain[:, 0], 1 / clusters) for head in students]
        parameters = list(self.students.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True)

    def step(self, anchors: Tensor, partners: Tensor, learning_rate: float) -> Tensor:
        """Train on a batch of pairs, [B, D] each; the loss of each head [H] before the step."""
        config = self.config
        views = torch.cat([anchors, partners]).to(self.device)
        students = [head(views) / config.student_temp for head in self.students]
        with torch.no_grad():
            teachers = [
                (head(views) / config.teacher_temp).log_softmax(dim=-1) for head in self.teachers
            ]
            weight = torch.stack([self._pair_weight(teacher.exp()) for teacher in teachers])
            weight = weight.mean(dim=0)  # (B)
        losses = torch.stack(
            [
                self._head_loss(head, student.log_softmax(dim=-1), teacher, weight)
                for head, (student, teacher) in enumerate(zip(students, teachers, strict=True))
            ]
        )
        self.optimizer.zero_grad()
        losses.mean().backward()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        with torch.no_grad():
            for old, new in zip(
                self.teachers.parameters(), self.students.parameters(), strict=True
            ):
                old.lerp_(new, 1 - config.teacher_momentum)
        return losses.detach()

    @staticmethod
    def _pair_weight(probs: Tensor) -> Tensor:
        first, second = probs.chunk(2)
        return (first * second).sum(dim=-1)

    def _head_loss(self, head: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        updated = 0.9 * self.marginals[head] + 0.1 * teacher.exp().mean(dim=0)
        self.marginals[head] = updated.clamp_min(torch.finfo(updated.dtype).tiny)
        log_marginal = self.marginals[head].log()
        directions = []
        for ours, theirs in zip(student.chunk(2), reversed(teacher.chunk(2)), strict=True):
            ratio = self.config.beta * (ours + theirs) - log_marginal
            directions.append(-(weight * ratio.logsumexp(dim=-1)).mean())
        return sum(directions) / 2

    def epoch(self, loader: DataLoader, epoch: int) -> np.ndarray:
        """Train for one epoch, counted from 0; the mean loss of each head [H].

        The learning rate rises linearly over ``warmup_epochs`` and stays; in the first epoch the
        last layers stand still.
        """
        for head in self.students:
            for parameter in (head.gain, head.direction):
                parameter.requires_grad_(epoch > 0)
                parameter.grad = None
        peak = self.config.learning_rate * self.config.batch_size / 256
        warmup = self.config.warmup_epochs * len(loader)
        losses = []
        for step, (anchors, partners) in enumerate(loader, start=epoch * len(loader)):
            rate = peak * min(1, (step + 1) / warmup) if warmup else peak
            losses.append(self.step(anchors, partners, rate))
        return torch.stack(losses).mean(dim=0).cpu().numpy()

    @torch.inference_mode()
    def labels(self, x: Tensor) -> np.ndarray:
        """Cluster [H, N] of each embedding [N, D] under each teacher head."""
        x = x.to(self.device)
        return np.stack([head(x).argmax(dim=-1).cpu().numpy() for head in self.teachers])


def build(
    x: Tensor, neighbors: Tensor, config: TrainConfig, device: str = "cpu"
) -> tuple[PlainTemi, DataLoader]:
    """Model and loader for embeddings [N, D] and the ids of their neighbours [N, k].

    Beside a GPU eight processes load the batches, which on a CPU would take its cores.
    """
    torch.manual_seed(config.seed)
    heads = [Head(x.shape[1], config.num_clusters) for _ in range(config.num_heads)]
    beside = {} if device == "cpu" else {"num_workers": 8, "persistent_workers": True}
    pairs = Pairs(x, neighbors)
    loader = DataLoader(pairs, config.batch_size, shuffle=True, drop_last=True, **beside)
    return PlainTemi(heads, config, device), loader
