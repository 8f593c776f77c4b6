"""TEMI against the numbers of the paper authors' released implementation, in float64.

The file is the one named by the environment variable TEMI_REFERENCE, else the one in the folder
``shared`` beside the project; every case in it is run. ``loss_*`` is one evaluation of the loss,
``traj_*`` a number of whole training steps.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from temi.config import TrainConfig
from temi.heads import MultiHead
from temi.losses import temi_loss
from temi.steps import TrainState, training_step

BESIDE = Path(__file__).parents[2] / "shared" / "reference" / "temi_reference.npz"
FILE = Path(os.environ.get("TEMI_REFERENCE", BESIDE))
EXACT = {"rtol": 0, "atol": 1e-9}  # weights and marginals
CLOSE = {"rtol": 0, "atol": 1e-7}  # losses and gradients
LAYERS = {  # name in the file -> name in MultiHead
    "mlp.0.weight": "weight1",
    "mlp.0.bias": "bias1",
    "mlp.2.weight": "weight2",
    "mlp.2.bias": "bias2",
    "last_layer.weight_g": "gain",
    "last_layer.weight_v": "direction",
}


def cases(kind: str) -> list:
    if not FILE.exists():
        if "TEMI_REFERENCE" in os.environ:
            raise FileNotFoundError(f"TEMI_REFERENCE={FILE}: there is no such file")
        return [pytest.param(None, marks=pytest.mark.skip(reason="no reference numbers here"))]
    arrays = dict(np.load(FILE))
    names = sorted({key.split("/")[0] for key in arrays if key.startswith(kind)})
    prefix = [{k.removeprefix(f"{n}/"): v for k, v in arrays.items() if k.startswith(f"{n}/")}
              for n in names]  # fmt: skip
    return [pytest.param(case, id=name) for name, case in zip(names, prefix, strict=True)]


def heads_of(case: dict, moment: str) -> dict[str, torch.Tensor]:
    count = len(case["marginal_final"])
    return {
        ours: torch.from_numpy(np.stack([case[f"{moment}/{h}.{theirs}"] for h in range(count)]))
        for theirs, ours in LAYERS.items()
    }


@pytest.mark.parametrize("case", cases("loss"))
def test_loss_gradient_and_marginal(case):
    student = torch.from_numpy(case["student_logits"]).requires_grad_()
    losses, marginal = temi_loss(
        student,
        torch.from_numpy(case["teacher_logits"]),
        torch.from_numpy(case["marginal_before"]),
        beta=float(case["beta"]),
        student_temp=float(case["student_temp"]),
        teacher_temp=float(case["teacher_temp"]),
    )
    losses.mean().backward()
    np.testing.assert_allclose(marginal.numpy(), case["marginal_after"], **EXACT)
    np.testing.assert_allclose(losses.detach().numpy(), case["head_losses"], **CLOSE)
    np.testing.assert_allclose(student.grad.numpy(), case["grad_student_logits"], **CLOSE)


@pytest.mark.parametrize("case", cases("traj"))
def test_training_trajectory(case):
    start = heads_of(case, "init")
    heads, hidden_dim, in_dim = start["weight1"].shape
    _, clusters, bottleneck_dim = start["direction"].shape
    student = MultiHead(in_dim, clusters, heads, hidden_dim, bottleneck_dim).double()
    student.load_state_dict(start)
    state = TrainState.start(student, float(case["weight_decay"]))
    config = TrainConfig(
        recipe="paper",
        num_clusters=clusters,
        beta=float(case["beta"]),
        student_temp=float(case["student_temp"]),
        teacher_temp=float(case["teacher_temp"]),
        teacher_momentum=float(case["momentum"]),
        device="cpu",
    )
    x = torch.from_numpy(case["x"])
    pairs = np.concatenate([case["idx_anchor"], case["idx_neighbor"]], axis=1)
    losses = [training_step(state, x[index], config, float(case["lr"])) for index in pairs]
    np.testing.assert_allclose(torch.stack(losses).numpy(), case["head_losses"], **CLOSE)
    np.testing.assert_allclose(state.marginal.numpy(), case["marginal_final"], **EXACT)
    for moment, network in (("student_final", state.student), ("teacher_final", state.teacher)):
        for name, expected in heads_of(case, moment).items():
            ours = network.get_parameter(name).detach().numpy()
            np.testing.assert_allclose(ours, expected.numpy(), **EXACT, err_msg=f"{moment} {name}")
