import copy
import dataclasses

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from tqdm import tqdm

import temi.training as training
from temi import checkpoints
from temi.cache import embed
from temi.config import TrainConfig
from temi.data import load_images
from temi.devices import runs_bf16
from temi.embeddings import Features
from temi.heads import MultiHead
from temi.metrics import cluster_accuracy
from temi.neighbors import mutual_neighbors, search_neighbors
from temi.results import accuracies
from temi.steps import (
    TrainState,
    draw_pairs,
    learning_rate_at,
    teacher_temp_at,
    training_step,
)
from temi.training import train

BLOBS, CLASSES = make_blobs(240, 8, centers=4, cluster_std=1.0, random_state=0)
SMALL = TrainConfig(num_clusters=4, num_heads=3, epochs=8, batch_size=40, num_neighbors=5)
TWO_EPOCHS = dataclasses.replace(SMALL, epochs=2)


@pytest.fixture(scope="module")
def run():
    return train(BLOBS, SMALL, progress=False)


def weights(run) -> dict[str, torch.Tensor]:
    return dict(run.teacher.named_parameters())


def test_separate_blobs_are_found(run):
    assert cluster_accuracy(run.labels, CLASSES) == 1
    assert run.labels.shape == run.agreement.shape == (240,)
    assert run.head_labels.shape == (3, 240)


def test_same_seed_same_weights_other_seed_others(run):
    again = train(BLOBS, SMALL, progress=False)
    other = train(BLOBS, dataclasses.replace(SMALL, seed=1), progress=False)
    for name, weight in weights(run).items():
        assert torch.equal(weight, weights(again)[name])
    assert not torch.equal(run.teacher.weight1, other.teacher.weight1)


def test_features_and_arrays_are_the_same_thing(run):
    again = train(Features.from_array(BLOBS), SMALL, progress=False)
    np.testing.assert_array_equal(again.labels, run.labels)


def test_the_bar_moves_within_an_epoch(monkeypatch, capsys):
    """Of many images an epoch takes minutes."""

    class Shown(tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"mininterval": 0})

    monkeypatch.setattr("temi.training.tqdm", Shown)
    train(BLOBS, dataclasses.replace(SMALL, epochs=2), log_every=3)  # of six steps an epoch
    said = [line.split("|") for line in capsys.readouterr().out.strip().split("\r")]
    shares = {bar[-1].split()[0]: bar[0] for bar in said}
    assert list(shares) == ["0/2", "0.5/2", "1.0/2", "1.5/2", "2.0/2", "2/2"]
    assert shares["1.5/2"] == "training:  75%"


def test_much_to_prepare_is_said(monkeypatch, capsys):
    short = dataclasses.replace(SMALL, epochs=1)
    cases = (1920, True, True), (1920, False, False), (1921, True, False)
    for large, progress, expected in cases:
        monkeypatch.setattr("temi.training.LARGE", large)
        train(BLOBS, short, progress=progress)
        said = capsys.readouterr().out.splitlines()
        assert ("preparing 240 rows of 8 numbers" in said) == expected


def test_prediction_repeats_the_training_labels(run):
    np.testing.assert_array_equal(run.predict(BLOBS), run.labels)
    np.testing.assert_array_equal(run.predict_heads(BLOBS), run.head_labels)
    half = run.predict(BLOBS[:120])  # the mean is that of the training images
    np.testing.assert_array_equal(half, run.labels[:120])


def test_probabilities(run):
    probs = run.predict_proba(BLOBS)
    assert probs.shape == (240, 4)
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)
    sure = run.agreement == 1
    np.testing.assert_array_equal(probs[sure].argmax(axis=1), run.labels[sure])


def test_history(run):
    assert [entry["epoch"] for entry in run.history] == list(range(1, 9))
    assert run.history[-1]["head_losses"] == run.head_losses.tolist()
    assert run.best_head == run.head_losses.argmin()
    assert 0 < run.history[-1]["marginal_entropy"] <= np.log(4) + 1e-6


def test_last_layer_rests_in_the_first_epoch():
    one = train(BLOBS, dataclasses.replace(SMALL, epochs=1), progress=False)
    assert (one.teacher.gain == 1).all()
    two = train(BLOBS, dataclasses.replace(SMALL, epochs=2), progress=False)
    assert not (two.teacher.gain == 1).all()


@pytest.mark.parametrize("loss", ["wmi", "pmi", "scan"])
def test_other_losses_learn_too(loss):
    run = train(BLOBS, dataclasses.replace(SMALL, loss=loss), progress=False)
    assert cluster_accuracy(run.labels, CLASSES) > 0.9


@pytest.mark.skipif(not runs_bf16("cpu"), reason="bfloat16 products stop the process here")
def test_bfloat16_gives_the_same_clusters(run):
    half = train(BLOBS, dataclasses.replace(SMALL, precision="bf16"), progress=False)
    assert cluster_accuracy(half.labels, run.labels) == 1


def test_mutual_neighbours_are_kept_of_those_that_are_searched(run):
    mutual = dataclasses.replace(SMALL, mutual_neighbors=True)
    found = train(BLOBS, mutual, progress=False)
    near, _ = search_neighbors(run.inputs(BLOBS), 5)
    given = train(BLOBS, SMALL, neighbors=mutual_neighbors(near).numpy(), progress=False)
    assert torch.equal(found.teacher.weight1, given.teacher.weight1)
    assert not torch.equal(found.teacher.weight1, run.teacher.weight1)
    as_given = train(BLOBS, mutual, neighbors=near.numpy(), progress=False)
    assert torch.equal(as_given.teacher.weight1, run.teacher.weight1)


def test_clipped_gradients_change_the_course(run):
    clipped = train(BLOBS, dataclasses.replace(SMALL, clip_grad=1e-3), progress=False)
    assert not torch.equal(clipped.teacher.weight1, run.teacher.weight1)


def test_bad_data_stops_before_any_work(tmp_path):
    x = BLOBS.copy()
    x[7, 2] = np.nan
    with pytest.raises(ValueError, match="row 7 holds NaN"):
        train(x, SMALL, run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="batch_size=40: at most 30"):
        train(BLOBS[:30], SMALL, run_dir=tmp_path / "run")
    images = load_images("digits")
    features = embed(images, "pixels", data_dir=tmp_path)
    some = images.keep(images.ids[:1000])
    with pytest.raises(ValueError, match="'digits/1000' is no image of 'digits'"):
        train(features, SMALL, run_dir=tmp_path / "run", images=some)
    turned = dataclasses.replace(features, ids=features.ids[::-1])
    with pytest.raises(ValueError, match="order is not that of the embeddings' ids"):
        train(turned, SMALL, run_dir=tmp_path / "run", images=images)
    with pytest.raises(ValueError, match="1000 of them for 1797 embeddings"):
        train(features.x, SMALL, run_dir=tmp_path / "run", images=some)
    assert not (tmp_path / "run").exists()


def test_pairs():
    neighbors = torch.arange(100).unsqueeze(1) * 1000 + torch.arange(3)
    pairs = draw_pairs(neighbors, 30, torch.Generator().manual_seed(0))
    assert pairs.shape == (3, 60)
    anchors, partners = (view.flatten() for view in pairs.chunk(2, dim=1))
    assert len(set(anchors.tolist())) == 90  # each image at most once
    torch.testing.assert_close(partners // 1000, anchors)  # a neighbour of that very anchor
    assert set((partners % 1000).tolist()) == {0, 1, 2}


def test_teacher_temperature():
    config = TrainConfig(teacher_temp=0.07, teacher_temp_start=0.04, temp_warmup_epochs=2)
    temps = [teacher_temp_at(step, 5, config) for step in range(20)]
    np.testing.assert_allclose(temps[:10], 0.04 + 0.003 * np.arange(10))
    np.testing.assert_allclose(temps[10:], 0.07)
    assert teacher_temp_at(0, 5, TrainConfig(teacher_temp=0.07)) == 0.07


def test_warming_up_the_temperature_changes_the_course(run):
    warm = dataclasses.replace(SMALL, teacher_temp_start=0.2, temp_warmup_epochs=1)
    assert not torch.equal(train(BLOBS, warm, progress=False).teacher.weight1, run.teacher.weight1)


def test_learning_rate():
    config = TrainConfig(learning_rate=1e-3, batch_size=512, warmup_epochs=2, epochs=10)
    rates = [learning_rate_at(step, 5, config) for step in range(50)]
    np.testing.assert_allclose(rates[:10], 2e-3 * np.arange(1, 11) / 10)  # 512 / 256 = twice
    np.testing.assert_allclose(rates[10:], 2e-3)
    cosine = dataclasses.replace(config, schedule="cosine")
    rates = [learning_rate_at(step, 5, cosine) for step in range(50)]
    expected = 1e-3 * (1 + np.cos(np.pi * np.arange(40) / 40))
    np.testing.assert_allclose(rates[10:], expected)
    no_warmup = dataclasses.replace(config, warmup_epochs=0)
    assert learning_rate_at(0, 5, no_warmup) == 2e-3


def test_a_captured_state_is_left_by_the_steps_after_it():
    config = TrainConfig(num_clusters=4, num_heads=2, batch_size=8, group_size=2, device="cpu")
    state = TrainState.start(MultiHead(6, 4, 2, 8, 4), config.weight_decay)
    views = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    training_step(state, views, config, 1e-3)
    captured = state.capture()
    before = copy.deepcopy(captured)
    state.restore(captured)
    training_step(state, views, config, 1e-3)
    for part in ("student", "teacher"):
        for name, tensor in before[part].items():
            assert torch.equal(captured[part][name], tensor)
    for index, moments in before["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(captured["optimizer"]["state"][index][name], tensor)
    state.restore(captured)
    assert state.marginal.data_ptr() != captured["marginal"].data_ptr()


def test_probabilities_are_of_the_teachers_temperature():
    run = train(BLOBS, TWO_EPOCHS, progress=False)
    run = dataclasses.replace(run, config=dataclasses.replace(TWO_EPOCHS, teacher_temp=0.3))
    with torch.inference_mode():
        probs = (run.teacher(run.inputs(BLOBS)) / 0.3).softmax(dim=-1)  # (H, N, K)
    aligned = np.empty(probs.shape)
    for head in range(3):
        aligned[head][:, run.alignment[head]] = probs[head]
    np.testing.assert_allclose(run.predict_proba(BLOBS), aligned.mean(axis=0), atol=1e-5)


def test_the_best_head_of_the_history_is_that_of_the_lowest_loss():
    class Run:
        head_labels = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
        labels, best_head = head_labels[0], 1  # of the lower loss, and the less accurate

    found = accuracies(Run, np.array([5, 5, 6, 6]))
    assert found == {"mean_head_acc": 0.75, "best_head_acc": 0.5, "ensemble_acc": 1.0}


def test_the_gradient_norm_of_an_epoch_is_the_mean_of_its_steps():
    norms = []

    def log(number, losses, norm, rate):
        norms.append(float(norm))

    run_epoch = training.run_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_epoch", lambda t, s, _: run_epoch(t, s, log))
        run = train(BLOBS, TWO_EPOCHS, progress=False, log_every=1)
    means = np.reshape(norms, (2, 6)).mean(axis=1)
    np.testing.assert_allclose([e["gradient_norm"] for e in run.history], means, rtol=1e-5)


def test_decay_is_that_of_the_settings():
    runs = [train(BLOBS, dataclasses.replace(TWO_EPOCHS, weight_decay=decay), progress=False)
            for decay in (0.0, 1.0)]  # fmt: skip
    norms = [float(run.teacher.weight1.norm()) for run in runs]
    assert norms[1] < norms[0]


def test_a_gradient_below_the_limit_is_left_as_it_is():
    plain, limited = (train(BLOBS, dataclasses.replace(TWO_EPOCHS, clip_grad=limit), progress=False)
                      for limit in (None, 1e6))  # fmt: skip
    for one, other in zip(plain.teacher.parameters(), limited.teacher.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_the_entropy_in_the_history_is_the_mean_over_heads(tmp_path):
    run = train(BLOBS, TWO_EPOCHS, run_dir=tmp_path, progress=False)
    _, content = checkpoints.newest(tmp_path / checkpoints.FOLDER)
    entropy = torch.special.entr(content["marginal"].double()).sum(dim=1)  # (H)
    assert entropy.max() - entropy.mean() > 1e-4
    assert run.history[-1]["marginal_entropy"] == pytest.approx(float(entropy.mean()), abs=1e-6)
