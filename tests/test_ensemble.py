import itertools

import numpy as np
import pytest
import torch

from temi import distributed, ensemble
from temi.ensemble import (
    agreement_between_heads,
    align_heads,
    head_labels,
    loss_weights,
    mean_probs,
    relabel,
    vote,
)
from temi.heads import MultiHead

K = 5


def shuffled_copies(labels: np.ndarray, count: int, rng, noise: float = 0.0) -> np.ndarray:
    """The same clustering under other numbers, some images at random."""
    copies = np.stack([rng.permutation(K)[labels] for _ in range(count)])
    wrong = rng.random(copies.shape) < noise
    return np.where(wrong, rng.integers(K, size=copies.shape), copies)


def test_alignment_undoes_permutations():
    rng = np.random.default_rng(0)
    labels = rng.integers(K, size=300)
    heads = shuffled_copies(labels, 8, rng)
    aligned = relabel(heads, align_heads(heads, K, reference=3))
    np.testing.assert_array_equal(aligned, np.tile(heads[3], (8, 1)))


def test_alignment_maximises_the_agreement_of_all_pairs():
    """Against trying every numbering of three heads with three clusters."""
    for seed in range(20):
        heads = np.random.default_rng(seed).integers(3, size=(3, 40))

        def agreement(alignment, heads=heads):
            return agreement_between_heads(relabel(heads, np.array(alignment))).sum()

        numberings = list(itertools.permutations(range(3)))
        best = max(map(agreement, itertools.product(numberings, repeat=3)))
        reached = max(agreement(align_heads(heads, 3, reference)) for reference in range(3))
        assert reached > 0.97 * best


def test_vote_is_better_than_its_heads():
    rng = np.random.default_rng(1)
    labels = rng.integers(K, size=2000)
    heads = shuffled_copies(labels, 9, rng, noise=0.4)
    aligned = relabel(heads, align_heads(heads, K, reference=0))
    winners, agreement = vote(aligned, K, 0)
    right = max(
        (np.array(order)[winners] == labels).mean() for order in itertools.permutations(range(K))
    )
    assert right > 0.97  # a single head: about 0.68
    assert agreement.mean() == pytest.approx(0.68, abs=0.03)


def test_every_alignment_is_a_permutation():
    rng = np.random.default_rng(2)
    heads = rng.integers(2, size=(4, 50))  # three of five clusters are empty
    alignment = align_heads(heads, K, 0)
    np.testing.assert_array_equal(np.sort(alignment, axis=1), np.tile(np.arange(K), (4, 1)))


def test_ties():
    aligned = np.array([[2, 2, 1], [1, 1, 2], [1, 3, 3], [2, 0, 0]])
    winners, agreement = vote(aligned, 4, reference=0)
    assert winners.tolist() == [2, 2, 1]  # 2:2, and four alone: the reference decides
    assert agreement.tolist() == [0.5, 0.25, 0.25]
    tie_without_reference = np.array([[3], [2], [2], [1], [1]])
    assert vote(tie_without_reference, 4, reference=0)[0].tolist() == [1]  # the lower number


def test_agreement_between_heads():
    aligned = np.array([[0, 1, 2, 3], [0, 1, 2, 0], [1, 1, 1, 1]])
    expected = [[1, 0.75, 0.25], [0.75, 1, 0.25], [0.25, 0.25, 1]]
    np.testing.assert_array_equal(agreement_between_heads(aligned), expected)


def test_vote_against_a_plain_count(monkeypatch):
    """With weights, in chunks of which the last is short."""
    rng = np.random.default_rng(3)
    aligned, weights = rng.integers(K, size=(6, 100)), rng.random(6)
    expected = [
        max(range(K), key=lambda c, column=column: weights[column == c].sum())
        for column in aligned.T
    ]
    monkeypatch.setattr(ensemble, "CHUNK", 33)
    assert vote(aligned, K, 0, weights)[0].tolist() == expected


def test_a_weighted_tie_goes_to_the_reference():
    aligned = np.array([[4], [4], [4], [2]])
    assert vote(aligned, K, 3, np.array([0.1, 0.1, 0.1, 0.3]))[0].tolist() == [2]
    assert vote(aligned, K, 0, np.array([0.1, 0.1, 0.1, 0.3]))[0].tolist() == [4]


def test_loss_weights():
    losses = np.array([-2.0, -1.0, -1.0, 0.0])
    weights = loss_weights(losses)
    assert weights.mean() == pytest.approx(1)
    assert weights[0] / weights[1] == pytest.approx(np.exp(1 / losses.std()))
    np.testing.assert_allclose(loss_weights(10 * losses + 3), weights)
    np.testing.assert_array_equal(loss_weights([5.0, 5.0]), [1, 1])


def test_mean_probs_against_a_plain_loop(monkeypatch):
    torch.manual_seed(0)
    heads, x = MultiHead(8, K, 3, 16, 4), torch.randn(25, 8)
    rng = np.random.default_rng(4)
    alignment = np.stack([rng.permutation(K) for _ in range(3)])
    weights = np.array([1.0, 2.0, 5.0])
    probs = (heads(x) / 0.1).softmax(-1).detach().numpy()
    expected = np.zeros((25, K))
    for head in range(3):
        for own in range(K):
            expected[:, alignment[head, own]] += weights[head] / 8 * probs[head, :, own]
    monkeypatch.setattr(ensemble, "CHUNK", 10)
    found = torch.cat(list(mean_probs(heads, x, alignment, 0.1, weights))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("limit", "rows"), [(60, 4), (10**6, 10), (1, 1)])
def test_chunks_of_logits_stay_small(limit, rows, monkeypatch):
    """As many rows as the limit on logits allows, no more than a chunk, and at least one."""
    monkeypatch.setattr(ensemble, "CHUNK", 10)
    monkeypatch.setattr(ensemble, "LOGITS", limit)
    heads, x = MultiHead(8, K, 3, 16, 4), torch.randn(25, 8)
    chunks = list(ensemble.head_logits(heads, x))
    assert max(chunk.shape[1] for chunk in chunks) == rows
    torch.testing.assert_close(torch.cat(chunks, dim=1), heads(x).detach())


def test_asking_the_heads_for_long_shows_progress(monkeypatch, capsys):
    heads, x, shown = MultiHead(8, K, 3, 16, 4), torch.randn(25, 8), distributed.tqdm
    ensemble.head_labels(heads, x)
    assert capsys.readouterr().out == ""  # it takes no two seconds
    monkeypatch.setattr(distributed, "tqdm", lambda **options: shown(**options | {"delay": 0}))
    ensemble.head_labels(heads, x)
    assert "asking the heads: 100%" in capsys.readouterr().out


def test_many_clusters_in_small_numbers():
    heads = np.random.default_rng(0).integers(300, size=(3, 2000))
    expected = align_heads(heads, 300, 0)
    np.testing.assert_array_equal(align_heads(heads.astype(np.int16), 300, 0), expected)
    assert relabel(heads.astype(np.int16), expected).dtype == np.int16


@pytest.mark.parametrize("seed", range(20))
def test_no_other_numbers_of_one_head_agree_more(seed):
    heads = np.random.default_rng(seed).integers(3, size=(4, 40))
    alignment = align_heads(heads, 3, 0)
    best = agreement_between_heads(relabel(heads, alignment)).sum()
    for head, numbers in itertools.product(range(4), itertools.permutations(range(3))):
        other = alignment.copy()
        other[head] = numbers
        assert agreement_between_heads(relabel(heads, other)).sum() <= best + 1e-12


def test_agreement_counts_heads_whatever_their_weights():
    aligned = np.array([[4], [4], [4], [2]])
    assert vote(aligned, 5, 3, np.array([0.1, 0.1, 0.1, 0.9]))[1].tolist() == [0.25]


def test_what_is_yielded_leaves_the_callers_mode_alone():
    heads, x = MultiHead(8, 5, 3, 16, 4), torch.randn(25, 8)
    chunks = mean_probs(heads, x, np.tile(np.arange(5), (3, 1)), 0.1)
    assert next(chunks).dtype == torch.float32
    assert not torch.is_inference_mode_enabled()


def test_clusters_beyond_int16():
    heads = MultiHead(4, 40_000, 1, 2, 2)
    with torch.no_grad():
        heads.gain.zero_()
        heads.gain[0, 39_999] = 1
        heads.direction[0, 39_999] = torch.tensor([1.0, 0.0])
        heads.weight2.zero_()
        heads.bias2[0] = torch.tensor([1.0, 0.0])
    labels = head_labels(heads, torch.randn(3, 4))
    assert labels.tolist() == [[39_999] * 3]
    assert head_labels(MultiHead(4, 2**15, 1, 2, 2), torch.randn(3, 4)).dtype == np.int16


@pytest.mark.parametrize(
    ("weights", "words"),
    [([1, 1], r"shape \(2,\): \(3,\)"), ([1, -1, 1], "from 0 on"), ([0, 0, 0], "not all of them"),
     ([1, np.nan, 1], "finite")],
)  # fmt: skip
def test_weights_that_fit_no_heads_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        vote(np.zeros((3, 5), dtype=int), K, 0, weights)
    heads = MultiHead(4, K, 3)
    with pytest.raises(ValueError, match=words):
        next(mean_probs(heads, torch.ones(5, 4), np.tile(np.arange(K), (3, 1)), 0.1, weights))
