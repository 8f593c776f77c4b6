import itertools

import numpy as np
import pytest

from temi.ensemble import agreement_between_heads, align_heads, relabel, vote

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
