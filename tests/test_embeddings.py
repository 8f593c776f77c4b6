import numpy as np
import pandas as pd
import pytest
import torch

import temi
from temi import embeddings
from temi.embeddings import (
    Features,
    check_embeddings,
    checksum,
    load_features,
    mean_embedding,
    normalize,
)


def test_a_file_of_own_embeddings(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 4))
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "xy.npz", X=x, y=np.arange(30) % 3 + 5)
    plain = load_features(tmp_path / "x.npy")
    np.testing.assert_array_equal(plain.x, x)
    assert plain.labels is None
    labelled = load_features(str(tmp_path / "xy.npz"))
    assert labelled.class_names == ("5", "6", "7")
    np.testing.assert_array_equal(labelled.labels, np.arange(30) % 3)
    np.savez(tmp_path / "more.npz", X=x, names=np.array([None], dtype=object))
    np.testing.assert_array_equal(load_features(tmp_path / "more.npz").x, x)
    np.savez(tmp_path / "bad.npz", X=x, y=np.arange(29))
    with pytest.raises(ValueError, match=r"y has int64 \(29,\); int \(30,\) fits"):
        load_features(tmp_path / "bad.npz")
    np.savez(tmp_path / "none.npz", a=x)
    with pytest.raises(ValueError, match=r"an array X is needed, not \['a'\]"):
        load_features(tmp_path / "none.npz")


def rows(**changes) -> np.ndarray:
    x = np.ones((5, 3), dtype=changes.pop("dtype", np.float32))
    for row, value in changes.items():
        x[int(row.removeprefix("row")), 1] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (rows(row3=np.nan, row4=np.nan), "row 3 holds NaN"),
        (rows(row2=-np.inf), "row 2 holds infinity"),
        (np.diag([1.0, 0, 1]), "row 1 holds only zeros"),
        (rows(row3=1e16), r"row 3 holds numbers beyond 1e\+15; scale all rows down"),
        (np.diag([1.0, 1e-16, 1]), "row 1 holds no number above 1e-15; scale all rows up"),
        (np.ones((0, 3)), r"shape \(0, 3\): there are no rows"),
        (np.ones(4), r"shape \(4,\): an array of two dimensions"),
        (np.ones((2, 2, 2)), r"shape \(2, 2, 2\)"),
        (rows(dtype=np.int64), "dtype int64"),
        (np.array([["a"]]), "dtype <U1"),
        (rows(dtype=np.complex64), "dtype complex64"),
    ],
)
def test_bad_embeddings_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        check_embeddings(x)


@pytest.mark.parametrize("size", [1e15, 1e-15])
def test_embeddings_as_large_and_as_small_as_allowed_keep_their_direction(size):
    x = np.random.default_rng(0).normal(size=(100, 768))
    scaled = x / np.abs(x).max() * size if size > 1 else x / np.abs(x).max(axis=1).min() * size
    check_embeddings(scaled)
    np.testing.assert_allclose(normalize(scaled, "center-l2"), normalize(x, "center-l2"), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_own_arrays(dtype):
    features = Features.from_array(rows(dtype=dtype))
    assert (features.dataset, features.backbone, len(features)) == ("array", "own", 5)


@pytest.mark.parametrize("kind", [np.ma.masked_array, pd.DataFrame])
def test_what_only_looks_like_an_array(kind):
    for use in (Features.from_array, lambda x: temi.kmeans(x, 2)):
        with pytest.raises(ValueError, match=f"of type {kind(rows()).__class__.__name__}: a NumPy"):
            use(kind(rows()))


def test_normalize():
    x = np.random.default_rng(0).normal(3, 1, size=(50, 4)).astype(np.float32)
    np.testing.assert_array_equal(normalize(x, "none"), x)
    np.testing.assert_allclose(np.linalg.norm(normalize(x, "l2"), axis=1), 1, rtol=1e-6)
    centred = x - x.mean(axis=0)
    expected = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    np.testing.assert_allclose(normalize(x, "center-l2"), expected, atol=1e-6)
    mean = mean_embedding(x, "center-l2")  # new images: the old mean
    np.testing.assert_allclose(normalize(x[:3], "center-l2", mean), expected[:3], atol=1e-6)
    assert not mean_embedding(x, "l2").any()
    assert np.isfinite(normalize(np.ones((3, 2), np.float32), "center-l2")).all()


def test_a_missing_file_of_embeddings_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"dataset='.*gone\.npy': there is no such file"):
        load_features(tmp_path / "gone.npy")


@pytest.mark.parametrize("name", ["empty.npy", "text.npy", "cut.npy", "cut.npz"])
def test_files_that_hold_no_whole_array_are_one_line(name, tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    np.save(tmp_path / "cut.npy", x)
    np.savez(tmp_path / "cut.npz", X=x)
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("no array")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: max(len(content) // 2, 4)])
    with pytest.raises(ValueError, match=rf"dataset='.*{name}': no whole \.npy or \.npz file"):
        load_features(tmp_path / name)


def test_tables_and_tensors_are_told_what_to_become():
    for x in (pd.DataFrame(np.ones((3, 2))), torch.ones(3, 2), [[1.0, 2.0]]):
        with pytest.raises(ValueError, match=rf"type {type(x).__name__}: a NumPy array .*asarray"):
            check_embeddings(x)


def test_no_such_preparation():
    with pytest.raises(ValueError, match="how='l1': one of 'none', 'l2', 'center-l2' is allowed"):
        normalize(np.ones((2, 3)), "l1")


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_an_array_in_a_file_of_several_is_said(shape, tmp_path):
    np.save(tmp_path / "x.npy", np.ones(shape))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"no whole .npy or .npz file \(one array, as in a .npy"):
        load_features(tmp_path / "x.npz")


def test_the_mean_of_half_precision_is_summed_in_double():
    x = np.tile(np.array([[1], [1 + 2**-10]], dtype=np.float16), (50, 3))  # neighbours there
    np.testing.assert_array_equal(mean_embedding(x, "center-l2"), np.float32(1 + 2**-11))


def test_rows_of_later_chunks_count(monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK", 100)
    x = np.random.default_rng(0).normal(size=(240, 8))
    before = checksum(x)
    assert checksum(x.copy()) == before
    x[230, 3] += 1
    assert checksum(x) != before
    x[230, 3] = np.nan
    with pytest.raises(ValueError, match="row 230 holds NaN"):
        check_embeddings(x)
