import dataclasses
import errno
import json
import os
import pickle
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from test_training import TWO_EPOCHS

import temi.training
from temi import checkpoints, distributed, trouble
from temi.checkpoints import EMERGENCY, LATEST
from temi.config import TrainConfig
from temi.heads import MultiHead
from temi.losses import temi_loss
from temi.metrics import cluster_accuracy
from temi.steps import TrainState, training_step
from temi.training import train
from temi.trouble import DivergenceError, Signals, auto_batch, check_learned, collapsed_heads

BLOBS, CLASSES = make_blobs(240, 8, centers=4, random_state=0)
PAIRS = dict(group_size=2, num_neighbors=5, batch_size=40, learning_rate=2e-3, warmup_epochs=2)
SMALL = TrainConfig(num_clusters=4, num_heads=3, epochs=4, teacher_temp=0.07, **PAIRS)
LONG = dataclasses.replace(SMALL, epochs=20)  # 6 steps an epoch
LAST = SMALL.epochs * 6


@pytest.fixture(scope="module")
def whole():
    return train(BLOBS, SMALL, progress=False)


def assert_same_weights(ours, theirs):
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def assert_goes_on_as(whole, run_dir):
    """The run in ``run_dir`` can be resumed and ends as the uninterrupted one."""
    run = train(BLOBS, SMALL, run_dir=run_dir, resume="auto", progress=False)
    assert_same_weights(run.teacher.state_dict(), whole.teacher.state_dict())
    np.testing.assert_array_equal(run.labels, whole.labels)
    without_seconds = [
        [{k: v for k, v in entry.items() if k != "seconds"} for entry in r.history]
        for r in (run, whole)
    ]
    assert without_seconds[0] == without_seconds[1]
    return run


def emergency_of(run_dir) -> dict:
    return checkpoints.load(run_dir / "checkpoints" / EMERGENCY)


def at_step(number, monkeypatch, plant):
    """Do ``plant(state)`` before the step of that number, once; remember the states before."""
    calls, before = [], {}

    def planting(state, *arguments):
        if len(calls) == number:
            before.update(state.capture())
            plant(state)
        calls.append(state)
        return training_step(state, *arguments)

    monkeypatch.setattr("temi.state.training_step", planting)
    return before


def nan_in(network: str, head: int):
    def plant(state):
        with torch.no_grad():
            getattr(state, network).weight2[head, 3, 5] = torch.nan

    return plant


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_nan_is_reported_with_step_and_head(network, monkeypatch, tmp_path):
    before = at_step(100, monkeypatch, nan_in(network, 1))
    message = r"epoch 17, step 100 \(from 0\): the loss or gradient of head 1 is not finite, at"
    with pytest.raises(DivergenceError, match=message) as error:
        train(BLOBS, LONG, run_dir=tmp_path / "run", progress=False)
    assert "\n" not in str(error.value)
    saved = emergency_of(tmp_path / "run")
    assert (saved["epoch"], saved["step"]) == (16, 4)
    for part in ("student", "teacher"):
        assert_same_weights(saved[part], before[part])
    assert torch.equal(saved["marginal"], before["marginal"])


def test_a_bad_step_changes_nothing():
    student = MultiHead(8, 4, 3, generator=torch.Generator().manual_seed(0))
    state = TrainState.start(student, 1e-4)
    views = torch.from_numpy(BLOBS[:80]).float()
    training_step(state, views, SMALL, 1e-3)
    assert state.finite.all()
    before = state.capture()
    views[3, 2] = torch.inf
    training_step(state, views, SMALL, 1e-3)
    assert not state.finite.any()
    after = state.capture()
    for part in ("student", "teacher"):
        assert_same_weights(after[part], before[part])
    assert torch.equal(after["marginal"], before["marginal"])
    for one, other in zip(
        *(c["optimizer"]["state"].values() for c in (after, before)), strict=True
    ):
        assert_same_weights(one, other)


def test_a_gpu_is_looked_at_now_and_then():
    """The first bad step of several is found, and the steps since do not count."""
    training = type("Training", (), {"epoch": 2, "step": 10})
    finite = torch.ones(6, 3, dtype=torch.bool)
    finite[2, 1] = finite[4, 0] = False  # the last is step 29, so the bad one 26
    with pytest.raises(DivergenceError, match=r"epoch 3, step 26 .* of head 1 "):
        temi.training._look(training, list(finite), 29, 1e-3)
    assert training.step == 6


class Elsewhere:
    """Rows as on a GPU, where not every step is looked at; those of one step are not finite."""

    device = SimpleNamespace(type="elsewhere")

    def __init__(self, x: torch.Tensor, bad: int):
        self.x, self.left = x, bad

    def __getitem__(self, rows):
        self.left -= 1
        return self.x[rows] * (torch.nan if self.left == 0 else 1)


@pytest.fixture
def unlooked():
    """A training whose third step is not finite, which nobody looks at before the epoch ends."""
    x = torch.from_numpy(BLOBS).float()
    config = dataclasses.replace(SMALL, num_clusters=4, batch_size=24).resolve(len(x))
    near, _ = temi.nearest_neighbors(x, config.num_neighbors)
    training = temi.training.Training(x, near, config, {"block": None}, 10**9)
    training.x = Elsewhere(x, bad=3)
    return training


def test_a_bad_step_before_a_signal_is_found(unlooked):
    asked = iter([None] * 5)
    signals = type("", (), {"received": property(lambda _: next(asked, signal.SIGINT))})()
    with pytest.raises(DivergenceError, match=r"epoch 1, step 2 \(from 0\)"):
        temi.training.run_epoch(unlooked, signals)
    assert unlooked.step == 2  # so many are done


def test_a_bad_step_before_an_error_is_not_kept(unlooked, capsys):
    good = unlooked.capture()
    unlooked.restore = lambda _: None  # onto the device that there is not
    assert temi.training.rewind(unlooked, good, 5) is good
    assert "a step was not finite" in capsys.readouterr().out


def raise_after(original, number: int, at_once: bool):
    """Raise in one call, before or after it has done its work."""
    calls = []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == number and at_once:
            raise RuntimeError("planted")
        result = original(*arguments, **options)
        if len(calls) == number:
            raise RuntimeError("planted")
        return result

    return failing


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (MultiHead, "forward"),
        (torch.Tensor, "backward"),
        (torch.optim.AdamW, "step"),
        (torch.optim.SGD, "step"),  # the teacher
    ],
)
def test_an_exception_leaves_the_last_complete_step(
    owner, name, at_once, whole, monkeypatch, tmp_path
):
    number = 25 if name == "forward" else 16
    monkeypatch.setattr(owner, name, raise_after(getattr(owner, name), number, at_once))
    with pytest.raises(RuntimeError, match="planted"):
        train(BLOBS, SMALL, run_dir=tmp_path / "run", progress=False)
    monkeypatch.undo()
    saved = emergency_of(tmp_path / "run")
    assert saved["epoch"] * 6 + saved["step"] == (11 if name == "forward" else 15)
    assert_goes_on_as(whole, tmp_path / "run")


def test_retry_goes_back_with_a_tenth_of_the_rate(monkeypatch, tmp_path, capsys):
    at_step(15, monkeypatch, nan_in("student", 2))
    run = train(BLOBS, SMALL, run_dir=tmp_path / "run", on_divergence="retry", progress=False)
    assert "step 15" in capsys.readouterr().out
    (entry,) = run.retries
    assert (entry["epoch"], entry["step"], entry["heads"]) == (3, 15, [2])
    assert entry["reason"] == "not finite"
    rates = [entry["learning_rate"] for entry in run.history]
    full = SMALL.learning_rate * 40 / 256
    np.testing.assert_allclose(rates, [full / 2, full, full / 10, full / 10])
    assert checkpoints.position_of(tmp_path / "run" / "checkpoints" / LATEST) == (1, 4, 0)
    assert all(weight.isfinite().all() for weight in run.teacher.parameters())


def test_five_retries_and_no_more(monkeypatch):
    steps = []

    def always_bad(state, *_):
        steps.append(1)
        training_step(state, torch.full((80, 8), torch.nan), SMALL, 1e-3)
        return torch.zeros(3)

    monkeypatch.setattr("temi.state.training_step", always_bad)
    with pytest.raises(DivergenceError, match=r"learning rate 2\.60417e-10; what"):
        train(BLOBS, SMALL, on_divergence="retry", progress=False)
    assert len(steps) == 6


def test_a_learning_rate_of_ten_is_caught_and_retried():
    sizes = dict(num_clusters=4, num_heads=3, epochs=8, batch_size=40, num_neighbors=5)
    wild = TrainConfig(learning_rate=10.0, **sizes)
    with pytest.raises(DivergenceError, match=r"epoch [1-4]: the clusters of heads .* collapsed"):
        train(BLOBS, wild, progress=False)
    run = train(BLOBS, wild, on_divergence="retry", progress=False)
    assert 1 <= len(run.retries) <= 5
    assert run.retries[0]["reason"] == "collapse"
    assert [entry["epoch"] for entry in run.history] == list(range(1, 9))
    assert cluster_accuracy(run.labels, CLASSES) >= 0.75
    assert np.exp(run.history[-1]["marginal_entropy"]) > 3


def test_collapsed_heads():
    even, tilted = [0.25] * 4, [0.85, 0.05, 0.05, 0.05]  # entropies: all, 0.42 of log 4
    gone = [0.999, 0.0005, 0.0003, 0.0002]
    equal, two_lost, one_lost = [60] * 4, [118, 118, 3, 1], [80, 80, 79, 1]
    marginal = torch.tensor([even, even, tilted, tilted, tilted, gone])
    sizes = torch.tensor([equal, two_lost, equal, one_lost, two_lost, equal])
    assert collapsed_heads(marginal, sizes) == [4, 5]


def test_full_disk_leaves_the_earlier_checkpoints(monkeypatch, tmp_path, whole):
    save, saved = checkpoints.save, []

    class FullDisk(checkpoints._HashingFile):
        def write(self, block):
            if len(saved) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(block)

    def counting(*arguments):
        saved.append(1)
        save(*arguments)

    monkeypatch.setattr("temi.records.SAVE_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "save", counting)
    monkeypatch.setattr(checkpoints, "_HashingFile", FullDisk)
    with pytest.raises(OSError, match="No space left on device; what stood there before is as it"):
        train(BLOBS, SMALL, run_dir=tmp_path / "run", progress=False)
    monkeypatch.undo()
    assert checkpoints.load(tmp_path / "run" / "checkpoints" / LATEST)["epoch"] == 2
    assert_goes_on_as(whole, tmp_path / "run")


def out_of_memory_above(largest: int, monkeypatch):
    def step(state, views, *arguments):
        if len(views) > 2 * largest:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return training_step(state, views, *arguments)

    monkeypatch.setattr("temi.state.training_step", step)
    monkeypatch.setattr("temi.trouble.training_step", step)


def test_out_of_memory_says_what_fits(monkeypatch, tmp_path):
    out_of_memory_above(25, monkeypatch)
    with pytest.raises(MemoryError) as error:
        train(BLOBS, SMALL, run_dir=tmp_path / "run", progress=False)
    assert str(error.value) == (
        "batch_size=40: a step does not fit in memory on cpu; 20 fits now "
        "(batch_size='auto' finds it)"
    )
    with monkeypatch.context() as patch:  # two processes, each with half of the batch
        patch.setattr(distributed, "count", lambda: 2)
        patch.setattr(trouble, "fitting_batch", lambda config, x, batch: min(batch, 12))
        assert "; 20 fits now" in trouble.what_fits(SMALL, torch.zeros(90, 8))
    automatic = dataclasses.replace(SMALL, batch_size="auto", epochs=1)
    run = train(BLOBS, automatic, run_dir=tmp_path / "auto", progress=False)
    assert run.config.batch_size == 16  # the recipe's 128, halved
    again = train(BLOBS, automatic, run_dir=tmp_path / "auto", resume="auto", progress=False)
    assert again.config.batch_size == 16
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(MemoryError, match="not even one pair fits"):
        auto_batch(SMALL, torch.zeros(9, 8))


def test_gradients_are_clipped_by_norm():
    """As with torch.nn.utils.clip_grad_norm_ and a plain AdamW."""
    config = dataclasses.replace(SMALL, clip_grad=0.01)
    ours, plain = (MultiHead(8, 4, 3, generator=torch.Generator().manual_seed(0)).double()
                   for _ in range(2))  # fmt: skip
    views = torch.from_numpy(BLOBS[:80])
    state = TrainState.start(ours, 1e-4)
    optimizer = torch.optim.AdamW(plain.parameter_groups(1e-4), lr=1e-3)
    marginal = torch.full((3, 4), 0.25).double()
    for _ in range(3):
        teacher = MultiHead(8, 4, 3).double()
        teacher.load_state_dict(state.teacher.state_dict())
        losses, marginal = temi_loss(
            plain(views), teacher(views), marginal, beta=config.beta,
            student_temp=config.student_temp, teacher_temp=config.teacher_temp,
        )  # fmt: skip
        optimizer.zero_grad()
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        assert norm > 0.02
        optimizer.step()
        training_step(state, views, config, 1e-3)
        torch.testing.assert_close(state.gradient_norm, norm, rtol=1e-5, atol=0)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        moments = state.optimizer.state[one]["exp_avg"], optimizer.state[other]["exp_avg"]
        torch.testing.assert_close(*moments, rtol=1e-3, atol=1e-9)


def test_signals_are_taken_in_the_main_thread_alone():
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert signals.received is None
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):  # asked twice
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(BLOBS, SMALL, progress=False).labels)
    )
    thread.start()
    thread.join()
    assert len(results[0]) == 240


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_divergence_travels_between_processes():
    for error in (DivergenceError(3, 7, [0, 2], 0.1), DivergenceError(3, None, [1], 0.1)):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.entry, again.collapse) == (
            str(error),
            error.entry,
            error.collapse,
        )


@pytest.mark.parametrize("loss", ["temi", "wmi"])
@pytest.mark.parametrize(("beta", "clusters"), [(0.6, 10), (0.75, 3), (0.5, 300)])
def test_heads_that_call_all_clusters_equally_likely_are_noticed(loss, beta, clusters):
    """By the loss of equal logits; a little lower some are told apart. Other losses say nothing."""
    logits, level = torch.zeros(2, 8, clusters), torch.full((2, clusters), 1 / clusters)
    equal = temi_loss(logits, logits, level, beta=beta, loss=loss)[0].numpy()
    config = TrainConfig(num_clusters=clusters, beta=beta, loss=loss)
    with pytest.warns(UserWarning, match="hardly tell images apart"):
        check_learned(equal, config)
    check_learned(1.06 * equal, config)
    check_learned(equal, dataclasses.replace(config, loss="pmi"))


@pytest.mark.parametrize("beta", [0.55, 0.6, 0.7, 0.9])
def test_how_much_alike_neighbors_have_to_be(beta):
    """Around equal logits, larger ones pay from a correlation of (1 - beta) / beta on."""
    needed = (1 - beta) / beta
    generator = torch.Generator().manual_seed(0)
    one, noise = torch.randn(2, 1, 4000, 50, generator=generator, dtype=torch.float64)
    level = torch.full((1, 50), 0.02, dtype=torch.float64)
    for alike, pays in ((needed - 0.05, False), (needed + 0.05, True)):
        other = alike * one + (1 - alike**2) ** 0.5 * noise
        logits = 1e-3 * torch.cat([one, other], dim=1)
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        (loss,), _ = temi_loss(scale * logits, logits, level, beta=beta)
        (slope,) = torch.autograd.grad(loss, scale)
        assert (slope < 0) == pays


def test_a_training_that_finds_nothing_says_so():
    noise = np.random.default_rng(0).standard_normal((600, 32), dtype=np.float32)
    config = TrainConfig(num_clusters=20, num_heads=2, epochs=8)
    with pytest.warns(UserWarning, match="hardly tell images apart .mean loss -0.12"):
        train(noise, config, progress=False)


def test_half_of_the_heads_collapsed_is_an_end(monkeypatch):
    config = dataclasses.replace(TWO_EPOCHS, num_heads=4)
    for heads in ([2], [0, 2]):
        monkeypatch.setattr("temi.training.collapsed_heads", lambda *_, heads=heads: heads)
        if len(heads) == 1:
            assert train(BLOBS, config, progress=False).history[0]["collapsed_heads"] == [2]
        else:
            with pytest.raises(DivergenceError, match="epoch 1: the clusters of heads 0, 2 coll"):
                train(BLOBS, config, progress=False)


def test_a_batch_that_was_found_stays_when_a_run_goes_on(tmp_path, monkeypatch):
    config = dataclasses.replace(TWO_EPOCHS, batch_size="auto")
    monkeypatch.setattr("temi.training.auto_batch", lambda *_: 16)
    train(BLOBS, config, run_dir=tmp_path / "run", progress=False)
    monkeypatch.setattr("temi.training.auto_batch", lambda *_: 8)  # memory is less by now
    more = dataclasses.replace(config, epochs=3)
    again = train(BLOBS, more, run_dir=tmp_path / "run", resume="auto", progress=False)
    assert again.config.batch_size == 16
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["batch_size"] == 16


def test_a_run_stopped_in_its_first_epoch_goes_on_with_the_last_layer_at_rest(
    tmp_path, monkeypatch
):
    whole, steps = train(BLOBS, TWO_EPOCHS, progress=False), []

    def stopping(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return training_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("temi.state.training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(BLOBS, TWO_EPOCHS, run_dir=tmp_path / "run", progress=False)
    run = train(BLOBS, TWO_EPOCHS, run_dir=tmp_path / "run", resume="auto", progress=False)
    for one, other in zip(run.teacher.parameters(), whole.teacher.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_goes_on_along_the_axes_of_its_checkpoint(tmp_path, monkeypatch):
    config = dataclasses.replace(TWO_EPOCHS, pca_dim=4)
    train(BLOBS, config, run_dir=tmp_path / "run", progress=False)
    longer = dataclasses.replace(config, epochs=3)
    straight = train(BLOBS, longer, progress=False)

    def turned(*arguments, found=temi.training.principal_axes):
        return -found(*arguments)  # as another machine's may be

    monkeypatch.setattr("temi.training.principal_axes", turned)
    again = train(BLOBS, longer, run_dir=tmp_path / "run", resume="auto", progress=False)
    np.testing.assert_array_equal(again.axes, straight.axes)
    np.testing.assert_array_equal(again.teacher.weight1, straight.teacher.weight1)


def test_a_batch_to_be_found_is_shared_by_the_ranks(monkeypatch):
    tried = []
    monkeypatch.setattr(trouble, "fitting_batch", lambda c, x, most: tried.append(most) or most)
    monkeypatch.setattr(distributed, "count", lambda: 4)
    monkeypatch.setattr(distributed, "from_first", lambda make: make())
    assert auto_batch(TWO_EPOCHS, torch.zeros(1000, 8)) == 128
    assert tried == [32]
    assert auto_batch(TWO_EPOCHS, torch.zeros(100, 8)) == 100


def test_a_batch_is_tried_with_all_heads_and_groups(monkeypatch):
    tried = []

    def step(state, views, *_):
        tried.append((tuple(views.shape), tuple(state.marginal.shape)))

    monkeypatch.setattr(trouble, "training_step", step)
    config = dataclasses.replace(TWO_EPOCHS, group_size=4)
    assert trouble.fitting_batch(config, torch.zeros(50, 8), 40) == 40
    assert tried == [((160, 8), (3, 4))]
