"""Groups of more than two images, and principal components: what ``fast`` adds to the paper."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from temi.config import TrainConfig
from temi.embeddings import normalize, principal_axes
from temi.losses import pair_weights, temi_loss
from temi.runs import load_run
from temi.steps import draw_pairs
from temi.training import train


@pytest.mark.parametrize("loss", ["temi", "wmi", "pmi"])
def test_loss_of_a_group_is_the_mean_over_its_pairs(loss):
    heads, group, batch, clusters = 3, 4, 5, 6
    generator = torch.Generator().manual_seed(0)
    shape = (2, heads, group * batch, clusters)
    student, teacher = torch.randn(shape, generator=generator, dtype=torch.float64) / 5
    marginal = torch.full((heads, clusters), 1 / clusters, dtype=torch.float64)
    losses, after = temi_loss(student, teacher, marginal, loss=loss, group_size=group)
    log_s, log_t = (student / 0.1).log_softmax(-1), (teacher / 0.1).log_softmax(-1)
    beta = 1.0 if loss == "pmi" else 0.6
    expected = []
    for own, other in itertools.permutations(range(group), 2):
        rows, partners = (torch.arange(batch) + batch * member for member in (own, other))
        own_weights = pair_weights(log_t[:, rows].exp(), log_t[:, partners].exp())  # (H, B)
        weights = {"temi": own_weights.mean(0), "wmi": own_weights, "pmi": 1.0}[loss]
        ratio = (log_s[:, rows] + log_t[:, partners]).mul(beta).exp() / after[:, None]
        expected.append(-(weights * ratio.sum(-1).log()).mean(dim=1))
    torch.testing.assert_close(losses, torch.stack(expected).mean(dim=0))


def test_groups_hold_an_anchor_and_different_neighbours_of_it():
    neighbors = torch.arange(100).unsqueeze(1) * 1000 + torch.arange(1, 6)
    groups = draw_pairs(neighbors, 30, torch.Generator().manual_seed(0), group_size=4)
    assert groups.shape == (3, 120)
    anchors, *partners = groups.view(3, 4, 30).unbind(dim=1)
    assert len(set(anchors.flatten().tolist())) == 90
    partners = torch.stack(partners)  # (3, steps, B)
    torch.testing.assert_close(partners // 1000, anchors.expand_as(partners))
    assert all(len(set(p)) == 3 for p in (partners % 1000).flatten(1).T.tolist())
    assert set((partners % 1000).flatten().tolist()) == {1, 2, 3, 4, 5}


def test_settings_that_depend_on_the_data():
    config = TrainConfig(num_clusters=10, device="cpu")
    assert (config.epochs, config.num_neighbors) == (None, None)
    for images, epochs, neighbors in ((1797, 20, 13), (5000, 8, 22), (50_000, 4, 71), (20, 130, 3)):
        resolved = dataclasses.replace(config, batch_size=10).resolve(images)
        assert (resolved.epochs, resolved.num_neighbors) == (epochs, neighbors)
        assert resolved.group_size == 4
    few = TrainConfig(num_clusters=2, num_neighbors=2, epochs=7, device="cpu").resolve(1000)
    assert (few.num_neighbors, few.group_size, few.epochs) == (2, 3, 7)


def test_principal_axes_agree_with_scikit_learn():
    x = np.random.default_rng(0).normal(size=(300, 12)) * np.arange(12, 0, -1) + 5
    mean = x.mean(axis=0).astype(np.float32)
    axes = principal_axes(x.astype(np.float16), mean, 4, chunk_size=70)
    expected = PCA(4).fit(x).components_.T
    np.testing.assert_allclose(np.abs((axes * expected).sum(axis=0)), 1, atol=1e-4)
    projected = (x - mean) @ axes
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    prepared = normalize(x, "center-l2", mean, axes, chunk_size=70)
    np.testing.assert_allclose(prepared, projected, atol=1e-5)
    assert principal_axes(x, mean, 12) is None


def test_new_images_take_the_axes_of_those_trained_on(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 10)) + 8 * rng.normal(size=(3, 10)).repeat(30, axis=0)
    config = TrainConfig(num_clusters=3, num_heads=2, batch_size=15, num_neighbors=5, epochs=2,
                         pca_dim=4, device="cpu")  # fmt: skip
    run = train(x, config, run_dir=tmp_path / "run", progress=False)
    assert run.teacher.weight1.shape[-1] == 4
    np.testing.assert_array_equal(run.predict(x), run.labels)
    np.testing.assert_array_equal(load_run(tmp_path / "run").predict(x[:7]), run.labels[:7])
    longer = TrainConfig(**{**vars(config), "epochs": 3})
    again = train(x, longer, run_dir=tmp_path / "run", resume="auto", progress=False)
    straight = train(x, longer, progress=False)
    np.testing.assert_array_equal(again.teacher.weight1, straight.teacher.weight1)
