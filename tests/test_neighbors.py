import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

import temi
from temi import distributed, neighbors
from temi.neighbors import (
    approximate_neighbors,
    check_neighbors,
    mutual_neighbors,
    nearest_neighbors,
    nearest_similarities,
    search_neighbors,
)


@pytest.mark.parametrize("chunk_size", [7, 64, 1000, None])
@pytest.mark.parametrize(("rows", "k"), [(200, 6), (997, 3), (11, 10), (500, 1), (60, 40)])
def test_agrees_with_scikit_learn(rows, k, chunk_size):
    x = np.random.default_rng(0).normal(size=(rows, 5))
    indices, similarities = nearest_neighbors(torch.from_numpy(x), k, chunk_size)
    distances, expected = NearestNeighbors(n_neighbors=k, metric="cosine").fit(x).kneighbors()
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(similarities, 1 - distances, atol=1e-12)


@pytest.mark.parametrize(("count", "k"), [(5, 1), (13, 2), (33, 1), (33, 32)])
def test_neighbours_are_rows_that_there_are_even_if_all_are_unlike(count, k):
    x = torch.eye(count, dtype=torch.float64) - 1 / count  # cosines all below 0
    indices, similarities = nearest_neighbors(x, k)
    assert indices.max() < count
    assert not (indices == torch.arange(count)[:, None]).any()
    torch.testing.assert_close(similarities, torch.full_like(similarities, -1 / (count - 1)))


def test_a_copy_may_be_a_neighbour_but_not_the_row_itself():
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0.5, 1]])
    indices, _ = nearest_neighbors(x, 1)
    assert indices.flatten().tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_fit(k):
    with pytest.raises(ValueError, match=rf"num_neighbors={k}: 1 to 3 is allowed with 4 rows"):
        nearest_neighbors(torch.eye(4), k)


@pytest.mark.parametrize("compared", [1, 5000, 2**22])  # chunks of one row, of some, of all
@pytest.mark.parametrize("k", [1, 6, 20])
def test_mutual_neighbours_are_those_of_the_plain_definition(k, compared, monkeypatch):
    monkeypatch.setattr(neighbors, "COMPARED", compared)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 5)))
    near, _ = nearest_neighbors(x, k)
    lists = near.tolist()
    found = mutual_neighbors(near)
    for row, own in enumerate(lists):
        mutual = [other for other in own if row in lists[other]] or own[:1]
        assert found[row].tolist() == (mutual * k)[:k]


@pytest.fixture(scope="module")
def blobs() -> torch.Tensor:
    """Rows around centres, as embeddings are: neighbours are in few cells."""
    pytest.importorskip("faiss", reason="needs the extra 'large'")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 16))[rng.integers(20, size=5000)] + rng.normal(size=(5000, 16))
    return torch.from_numpy(x)


def test_approximate_neighbors_are_most_of_the_exact_ones(blobs, monkeypatch):
    exact, values = nearest_neighbors(blobs, 10)
    monkeypatch.setattr(neighbors, "PROBES", 16)  # of 128 cells
    found, similarities = approximate_neighbors(blobs, 10)
    assert found.shape == (5000, 10)
    assert (found != torch.arange(5000).unsqueeze(1)).all()
    assert (
        0.9
        < np.mean([len(np.intersect1d(*rows)) / 10 for rows in zip(found, exact, strict=True)])
        < 1
    )
    cosine = torch.cosine_similarity(blobs[found[:100]], blobs[:100].unsqueeze(1), dim=-1)
    np.testing.assert_allclose(similarities[:100], cosine, atol=1e-5)
    assert (similarities.diff(dim=1) <= 0).all()
    again, _ = approximate_neighbors(blobs, 10)
    assert (again == found).all()
    monkeypatch.setattr(neighbors, "PROBES", 128)  # all cells: exact
    np.testing.assert_allclose(approximate_neighbors(blobs, 10)[1], values, atol=1e-5)


def test_approximate_neighbors_of_copies_are_the_other_copies(blobs):
    indices, _ = approximate_neighbors(blobs[:1].repeat(100, 1), 5)
    assert indices.shape == (100, 5)
    assert (indices != torch.arange(100).unsqueeze(1)).all()


def test_too_few_rows_in_the_cells_are_said(blobs, monkeypatch):
    monkeypatch.setattr(neighbors, "PROBES", 1)
    with pytest.raises(ValueError, match="num_neighbors=400: the cells that were searched hold fe"):
        approximate_neighbors(blobs, 400)


def test_many_rows_are_searched_approximately_where_faiss_is_there(blobs, monkeypatch):
    exact = nearest_neighbors(blobs, 3)[0]
    assert (search_neighbors(blobs, 3)[0] == exact).all()
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 4999)
    reverse = exact.flip(1)
    monkeypatch.setattr(neighbors, "approximate_neighbors", lambda x, k, rows: (reverse, reverse))
    assert (search_neighbors(blobs, 3)[0] == reverse).all()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (search_neighbors(blobs, 3)[0] == exact).all()


def test_a_long_search_shows_its_progress_and_finds_the_same(blobs, monkeypatch, capsys):
    x, shown, at_once = blobs[:2000].float(), distributed.tqdm, {"delay": 0, "mininterval": 0}
    indices, similarities = nearest_neighbors(x, 3, chunk_size=20)
    monkeypatch.setattr(neighbors, "LARGEST", 20 * 2000)  # parts of ten such chunks
    monkeypatch.setattr(distributed, "tqdm", lambda **options: shown(**options | at_once))
    found, values = search_neighbors(x, 3)
    assert torch.equal(found, indices)
    assert torch.equal(values, similarities)
    said = capsys.readouterr().out
    assert "neighbours:  10%" in said
    assert "2000/2000" in said
    assert search_neighbors(x.half(), 3)[1].dtype == torch.float32
    approximate = approximate_neighbors(x, 3)[0]
    monkeypatch.setattr(neighbors, "EXACT_UP_TO", 1999)
    monkeypatch.setattr(neighbors, "LOOKED_UP", 800)
    capsys.readouterr()
    assert (search_neighbors(x, 3)[0] == approximate).all()
    said = capsys.readouterr().out
    assert "first the cells" in said
    assert "2000/2000" in said


def test_without_faiss_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match="run pip install faiss-cpu"):
        approximate_neighbors(torch.eye(10), 2)


@pytest.mark.parametrize("search", [nearest_neighbors, approximate_neighbors, temi.near_duplicates])
def test_rows_are_a_tensor(search):
    with pytest.raises(ValueError, match=r"x of type ndarray: torch\.from_numpy"):
        search(np.eye(10), 2)


def test_given_neighbours_may_lie_in_any_order_in_memory():
    near = np.array([[1, 2], [2, 0], [0, 1]])
    assert check_neighbors(np.asfortranarray(near), 3) == check_neighbors(near, 3)


def test_some_rows_of_the_approximate_neighbors(blobs):
    whole = approximate_neighbors(blobs, 5)[0]
    assert torch.equal(approximate_neighbors(blobs, 5, slice(1000, 2000))[0], whole[1000:2000])
    assert approximate_neighbors(blobs, 5, slice(5000, 5000))[0].shape == (0, 5)  # as a rank's may
    for k in (0, 5000):
        with pytest.raises(ValueError, match=f"num_neighbors={k}: 1 to 4999 is allowed"):
            approximate_neighbors(blobs, k)


def test_half_precision_is_raised(blobs):
    half = blobs[:50].half()
    indices, similarities = nearest_neighbors(half, 3)
    expected, values = nearest_neighbors(half.float(), 3)
    assert similarities.dtype == torch.float32
    assert torch.equal(similarities, values)
    assert torch.equal(indices, expected)


def test_similarities_are_cosines_whatever_the_lengths(blobs):
    x, queries = blobs[:50].float(), blobs[50:57].float()
    expected = nearest_similarities(queries, x, 2)
    torch.testing.assert_close(nearest_similarities(2 * queries, 3 * x, 2), expected)


def test_similarities_of_queries_and_rows_in_parts_are_those_of_all(blobs, monkeypatch):
    x, queries = blobs[:500], blobs[500:577]
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], x[None], dim=2)
    expected = cosines.sort(dim=1, descending=True).values[:, :30]
    monkeypatch.setattr(neighbors, "CHUNK", 20)  # of rows; fewer than the neighbours
    monkeypatch.setattr(neighbors, "LARGEST", 20 * 10)  # 10 queries at a time
    torch.testing.assert_close(nearest_similarities(queries, x, 30), expected)


def test_copies_are_alike_but_for_rounding():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    groups = temi.near_duplicates(torch.cat([x, 3 * x[:50]]), similarity=1.0)
    assert sorted(rows.tolist() for rows in groups) == [[row, 200 + row] for row in range(50)]
    for similarity in (97, -1.5, float("nan")):
        with pytest.raises(ValueError, match=r"similarity=.*: a cosine, -1 to 1, is allowed"):
            temi.near_duplicates(x, similarity=similarity)
    for chunk_size in (-1, 0):
        with pytest.raises(ValueError, match=f"chunk_size={chunk_size}: a whole number from 1"):
            temi.nearest_neighbors(x, 3, chunk_size=chunk_size)


def test_a_link_of_one_side_joins_duplicates():
    angles = torch.tensor([0.0, 1.0, 1.9, 90.0]) * torch.pi / 180  # each nearer to the next
    x = torch.stack([angles.cos(), angles.sin()], dim=1)
    (group,) = temi.near_duplicates(x, 0.999, k=1)  # 0 -> 1 -> 2 -> 1
    assert group.tolist() == [0, 1, 2]
    crowd = torch.tensor([0.0, 0.1, 5.0, 5.1]) * torch.pi / 180  # two pairs, near each other
    x = torch.stack([crowd.cos(), crowd.sin()], dim=1)
    assert [g.tolist() for g in temi.near_duplicates(x, 0.99, k=1)] == [[0, 1], [2, 3]]
    assert [g.tolist() for g in temi.near_duplicates(x, 0.99, k=3)] == [[0, 1, 2, 3]]
