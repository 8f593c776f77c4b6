"""Trains in float64, as one of several processes or alone, and stores what came of each loss.

Called with a file to write to; test_distributed.py starts it through torchrun, and calls
:func:`outcomes` itself.
"""

import sys

import torch

from temi import TrainConfig, distributed
from temi.neighbors import search_neighbors
from temi.state import Training
from temi.steps import TrainState
from temi.training import run_epoch

CASES = [("temi", 2), ("temi", 4), ("wmi", 2), ("pmi", 3), ("scan", 3)]
STEPS = 50


def outcomes() -> dict[tuple[str, int], dict]:
    """Losses of each epoch, marginals, labels and parameters after 50 steps, by loss and group."""
    x = torch.randn(240, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:120] += 2
    neighbors, _ = search_neighbors(x, 6)
    found = {}
    for loss, group_size in CASES:
        config = TrainConfig(
            num_clusters=5, num_heads=3, batch_size=24, group_size=group_size, num_neighbors=6,
            epochs=5, clip_grad=1.0, loss=loss, device="cpu",
        )  # fmt: skip
        training = Training(x.float(), neighbors, config, {"block": None}, 50)
        training.x = x
        student = training.state.student.double()
        training.state = TrainState.start(student, config.weight_decay)
        training.losses = training.losses.double()
        for _ in range(STEPS // (len(x) // 24)):
            run_epoch(training)
        teacher = training.state.teacher.state_dict()
        found[loss, group_size] = {
            "losses": torch.tensor([entry["head_losses"] for entry in training.history]),
            "marginal": training.state.marginal,
            "labels": training.labels,
            **training.state.student.state_dict(),
            **{f"teacher {name}": value for name, value in teacher.items()},
        }
    return found


if __name__ == "__main__":
    with distributed.one_voice():
        result = outcomes()
    if distributed.is_first():
        torch.save(result, sys.argv[1])
