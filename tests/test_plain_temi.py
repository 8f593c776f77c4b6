"""The baseline of the speed run computes TEMI, not something easier to beat."""

import numpy as np
import pytest
import torch
from test_reference import CLOSE, EXACT, LAYERS, cases, heads_of

from benchmarks.plain_temi import Head, PlainTemi, build
from temi.config import TrainConfig

NAMES = {  # name in the file -> name in Head
    layer: layer.replace(
        "last_layer.weight_g", "last_layer.parametrizations.weight.original0"
    ).replace("last_layer.weight_v", "last_layer.parametrizations.weight.original1")
    for layer in LAYERS
}


@pytest.mark.parametrize("case", cases("traj"))
def test_training_trajectory(case):
    start = heads_of(case, "init")
    count, hidden_dim, in_dim = start["weight1"].shape
    _, clusters, bottleneck_dim = start["direction"].shape
    heads = [Head(in_dim, clusters, hidden_dim, bottleneck_dim).double() for _ in range(count)]
    for index, head in enumerate(heads):
        head.load_state_dict({NAMES[k]: start[name][index] for k, name in LAYERS.items()})
    config = TrainConfig(
        recipe="paper",
        num_clusters=clusters,
        weight_decay=float(case["weight_decay"]),
        beta=float(case["beta"]),
        student_temp=float(case["student_temp"]),
        teacher_temp=float(case["teacher_temp"]),
        teacher_momentum=float(case["momentum"]),
        device="cpu",
    )
    model = PlainTemi(heads, config)
    x = torch.from_numpy(case["x"])
    batches = zip(case["idx_anchor"], case["idx_neighbor"], strict=True)
    losses = [model.step(x[a], x[b], float(case["lr"])) for a, b in batches]
    np.testing.assert_allclose(torch.stack(losses), case["head_losses"], **CLOSE)
    np.testing.assert_allclose(torch.stack(model.marginals), case["marginal_final"], **EXACT)
    for moment, network in (("student_final", model.students), ("teacher_final", model.teachers)):
        expected = heads_of(case, moment)
        for index, head in enumerate(network):
            for layer, name in LAYERS.items():
                ours = head.get_parameter(NAMES[layer]).detach()
                np.testing.assert_allclose(ours, expected[name][index], **EXACT)


def test_epoch_freezes_the_last_layer_and_warms_up():
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        recipe="paper", num_clusters=3, num_heads=2, batch_size=8, warmup_epochs=2, device="cpu"
    )
    model, loader = build(x, torch.arange(24).roll(1)[:, None], config)
    before = model.students[0].direction.detach().clone()
    model.epoch(loader, 0)
    rate = config.learning_rate * 8 / 256
    assert torch.equal(model.students[0].direction, before)
    assert model.optimizer.param_groups[0]["lr"] == pytest.approx(rate / 2)
    losses = model.epoch(loader, 1)
    assert not torch.equal(model.students[0].direction, before)
    assert model.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    assert losses.shape == (2,)
    assert model.labels(x).shape == (2, 24)
