"""What benchmarks/beyond.py adds to TEMI, each held against its definition."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import beyond
from temi import losses

SETTINGS = dict(beta=0.6, student_temp=0.1, teacher_temp=0.2, loss="temi", group_size=3)


@pytest.fixture
def batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    draw = dict(generator=generator, dtype=torch.float64)
    student, teacher = 0.1 * torch.randn(2, 4, 60, 5, **draw)
    teacher[..., 0] += 0.2  # a favourite cluster
    return student, teacher, torch.full((4, 5), 0.2, dtype=torch.float64)


def test_balanced_assignments_use_all_clusters_alike(batch, monkeypatch):
    seen = {}
    monkeypatch.setattr(losses, "temi_loss", lambda *tensors, **_: seen.update(teacher=tensors[1]))
    beyond.balanced(*batch, **SETTINGS)
    before, after = (
        (logits / SETTINGS["teacher_temp"]).softmax(dim=-1).mean(dim=1)
        for logits in (batch[1], seen["teacher"])
    )
    assert (before - 0.2).abs().max() > 0.1
    assert (after - 0.2).abs().max() < 0.01


def test_without_weights_every_pair_counts_alike(batch):
    student, teacher, _ = batch
    found, updated = beyond.unweighted(*batch, **SETTINGS)
    torch.testing.assert_close(updated, losses.temi_loss(*batch, **SETTINGS)[1])
    p, q = (student / 0.1).softmax(dim=-1), (teacher / 0.2).softmax(dim=-1)
    expected = torch.zeros(4, dtype=torch.float64)
    for row in range(60):
        for partner in ((row + 20) % 60, (row + 40) % 60):
            ratio = (p[:, row] * q[:, partner]) ** 0.6 / updated
            expected -= ratio.sum(dim=-1).log() / 120
    torch.testing.assert_close(found, expected)


def test_cross_entropy_is_that_of_the_pairs(batch):
    student, teacher, _ = batch
    plain, _ = losses.temi_loss(*batch, **SETTINGS)
    without, _ = beyond.with_cross_entropy(*batch, weight=0.0, **SETTINGS)
    torch.testing.assert_close(without, plain)
    found, updated = beyond.with_cross_entropy(*batch, weight=0.5, **SETTINGS)
    p, q = (student / 0.1).softmax(dim=-1), (teacher / 0.2).softmax(dim=-1)
    expected = torch.zeros(4, dtype=torch.float64)
    for row in range(60):
        for partner in ((row + 20) % 60, (row + 40) % 60):
            weight = (q[:, row] * q[:, partner]).sum(dim=-1).mean()
            expected -= weight * (q[:, partner] * p[:, row].log()).sum(dim=-1) / 120
    torch.testing.assert_close(found - plain, 0.5 * expected)
    torch.testing.assert_close(updated, losses.temi_loss(*batch, **SETTINGS)[1])


def test_adaptive_neighbours_lie_above_one_similarity():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    x[:150, 0] += 4  # a crowd
    found = beyond.adaptive_neighbors(x, 10)
    counts = np.array([len(set(row)) for row in found])
    assert found.shape == (300, 40)
    assert counts.min() >= 3
    assert counts[:150].mean() > 1.5 * counts[150:].mean()
    assert 10 <= counts.mean() < 12
    unit = torch.nn.functional.normalize(x, dim=1)
    farthest = [(unit[row] @ unit[list(set(own))].T).min() for row, own in enumerate(found)]
    kept = [float(far) for far, count in zip(farthest, counts, strict=True) if 3 < count < 40]
    outside = [float((unit[row] @ unit.T).topk(count + 2).values[-1])
               for row, count in enumerate(counts) if 3 < count < 40]  # fmt: skip
    assert max(outside) <= min(kept) + 1e-6


def test_mirrored_images(tmp_path):
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    Image.fromarray(picture).save(tmp_path / "a.png")
    (mirrored,) = list(beyond.Mirrored(str(tmp_path), ("a.png",)))
    np.testing.assert_array_equal(mirrored, np.asarray(picture)[:, ::-1])
