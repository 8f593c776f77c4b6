import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from temi.neighbors import nearest_neighbors


@pytest.mark.parametrize("chunk_size", [7, 64, 1000, None])
@pytest.mark.parametrize(("rows", "k"), [(200, 6), (997, 3), (11, 10), (500, 1), (60, 40)])
def test_agrees_with_scikit_learn(rows, k, chunk_size):
    x = np.random.default_rng(0).normal(size=(rows, 5))
    indices, similarities = nearest_neighbors(torch.from_numpy(x), k, chunk_size)
    distances, expected = NearestNeighbors(n_neighbors=k, metric="cosine").fit(x).kneighbors()
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(similarities, 1 - distances, atol=1e-12)


def test_a_copy_may_be_a_neighbour_but_not_the_row_itself():
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0.5, 1]])
    indices, _ = nearest_neighbors(x, 1)
    assert indices.flatten().tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_fit(k):
    with pytest.raises(ValueError, match=rf"num_neighbors={k}: 1 to 3 is allowed with 4 rows"):
        nearest_neighbors(torch.eye(4), k)
