"""What a GPU does: the same as the CPU, and whole steps launched as CUDA graphs change nothing."""

import dataclasses

import numpy as np
import pytest
import torch

import temi
from temi import TrainConfig, train
from temi.graphs import RecordedStep
from temi.heads import MultiHead
from temi.state import Training
from temi.steps import TrainState, draw_pairs, training_step
from temi.training import run_epoch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
BLOBS = np.concatenate(
    [np.random.default_rng(c).normal(8 * np.eye(24)[c], 1, (300, 24)) for c in range(6)]
).astype(np.float32)
SMALL = TrainConfig(
    num_clusters=6, num_neighbors=20, num_heads=3, batch_size=100, epochs=3, device="cuda"
)


def ready(loss: str, precision: str, frozen: bool) -> tuple[TrainState, TrainConfig]:
    heads = MultiHead(24, 6, 3, generator=torch.Generator().manual_seed(1)).cuda()
    state = TrainState.start(heads, 1e-4)
    state.freeze_last_layer(frozen)
    return state, dataclasses.replace(SMALL, loss=loss, precision=precision)


@pytest.mark.parametrize("loss", ["temi", "wmi", "pmi", "scan"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_recorded_step_is_the_step(loss, precision, frozen):
    plain, config = ready(loss, precision, frozen)
    state, _ = ready(loss, precision, frozen)
    recorded = RecordedStep(state, config)
    for group in plain.optimizer.param_groups:
        group["capturable"] = True  # takes the learning rate from a Tensor
    for step in range(12):
        views = torch.randn(200, 24, generator=torch.Generator().manual_seed(step)).cuda()
        rate, temperature = 1e-3 * (step + 1), 0.1 - 0.002 * step
        given = torch.tensor([rate, temperature], device="cuda")
        expected = training_step(plain, views, config, *given)
        assert torch.equal(recorded(views, rate, temperature), expected)
        assert torch.equal(state.marginal, plain.marginal)
        assert torch.equal(state.assigned, plain.assigned)
    assert recorded.graph is not None
    for ours, theirs in ((state.student, plain.student), (state.teacher, plain.teacher)):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_bad_step_changes_nothing():
    state, config = ready("temi", "fp32", False)
    recorded = RecordedStep(state, config)
    good = torch.randn(200, 24, device="cuda")
    for _ in range(3):
        recorded(good, 1e-3, 0.1)
    before = [p.clone() for p in [*state.student.parameters(), *state.teacher.parameters()]]
    marginal = state.marginal.clone()
    recorded(torch.full_like(good, torch.nan), 1e-3, 0.1)
    assert not state.finite.any()
    after = [*state.student.parameters(), *state.teacher.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(state.marginal, marginal)
    recorded(good, 1e-3, 0.1)
    assert state.finite.all()


def test_trainings_with_and_without_graphs_agree():
    config = dataclasses.replace(SMALL, precision="fp32")
    runs = [train(BLOBS, config, progress=False, cuda_graph=graph) for graph in (True, False)]
    assert np.array_equal(runs[0].labels, runs[1].labels)
    losses = [[epoch["head_losses"] for epoch in run.history] for run in runs]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_the_gpu_finds_what_the_cpu_finds():
    config = dataclasses.replace(SMALL, precision="fp32")
    gpu = train(BLOBS, config, progress=False)
    cpu = train(BLOBS, dataclasses.replace(config, device="cpu"), progress=False)
    assert temi.evaluate(gpu.labels, cpu.labels)["acc"] >= 0.97
    losses = [np.array([epoch["head_losses"] for epoch in run.history]) for run in (gpu, cpu)]
    np.testing.assert_allclose(*losses, rtol=0.02)
    found = temi.nearest_neighbors(torch.from_numpy(BLOBS).cuda(), 5)[0].cpu()
    expected = temi.nearest_neighbors(torch.from_numpy(BLOBS), 5)[0]
    assert (found == expected).float().mean() > 0.999


def test_a_resumed_training_is_the_same_to_the_bit(tmp_path):
    whole = train(BLOBS, SMALL, progress=False, run_dir=tmp_path / "whole")
    part = dataclasses.replace(SMALL, epochs=2)
    train(BLOBS, part, progress=False, run_dir=tmp_path / "part")
    resumed = train(BLOBS, SMALL, progress=False, run_dir=tmp_path / "part", resume="auto")
    assert np.array_equal(whole.head_labels, resumed.head_labels)
    for ours, theirs in zip(whole.history, resumed.history, strict=True):
        assert ours["head_losses"] == theirs["head_losses"]


def prepared(record: bool) -> Training:
    x = torch.from_numpy(BLOBS).cuda()
    neighbors, _ = temi.nearest_neighbors(x, 20)
    return Training(x, neighbors, SMALL.resolve(len(x)), {"block": None}, 10**9, record)


def test_a_training_goes_on_within_an_epoch_to_the_bit():
    whole, first, second = prepared(True), prepared(True), prepared(True)
    for training in (whole, first):
        run_epoch(training)
    run_epoch(whole)
    run_epoch(first, until=7)
    second.restore(first.capture())
    run_epoch(second)
    for one, other in zip(
        whole.state.student.parameters(), second.state.student.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    assert whole.history[-1]["head_losses"] == second.history[-1]["head_losses"]


@pytest.mark.parametrize("record", [True, False])
def test_no_step_waits_for_the_one_before(record, monkeypatch):
    training = prepared(record)
    pairs = draw_pairs(training.neighbors, 100, torch.Generator(), SMALL.group_size)
    monkeypatch.setattr("temi.training.draw_pairs", lambda *_: pairs)  # which does, once an epoch
    run_epoch(training, until=3)  # makes moments and graph
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_epoch(training, until=15)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.step == 15
    assert training.losses.isfinite().all()
