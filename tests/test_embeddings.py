import dataclasses
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from temi.backbones import load_backbone
from temi.config import TrainConfig
from temi.data import load_images
from temi.embeddings import (
    Features,
    check_embeddings,
    embed,
    load_cached,
    load_features,
    mean_embedding,
    normalize,
)
from temi.files import read_json
from temi.metrics import cluster_accuracy
from temi.training import train


@pytest.fixture(scope="module")
def images():
    return load_images("digits")


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pixels_are_the_grey_values(images, tmp_path):
    features = embed(images, "pixels", data_dir=tmp_path)
    assert features.x.dtype == np.float16
    grey = images.images.reshape(1797, 64) / np.float32(255)
    np.testing.assert_array_equal(features.x, grey.astype(np.float16))
    single = embed(images, "pixels", data_dir=tmp_path / "single", dtype="float32")
    np.testing.assert_array_equal(single.x, grey)
    assert features.ids == images.ids


def test_second_time_reads_the_cache(images, tmp_path):
    first = embed(images, data_dir=tmp_path)
    (manifest,) = tmp_path.rglob("manifest.json")
    assert manifest.parent == tmp_path / "embeddings" / "digits" / "pixels"
    written = manifest.stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(embed(images, data_dir=tmp_path).x, first.x)
        assert manifest.stat().st_mtime_ns == written
        embed(images, data_dir=tmp_path, force_recompute=True)
    assert manifest.stat().st_mtime_ns > written


def test_other_images_are_never_given_stale_embeddings(images, tmp_path):
    embed(images, data_dir=tmp_path)
    other = dataclasses.replace(images, images=images.images[::-1])
    with pytest.warns(UserWarning, match="computed anew: images of the same names have changed"):
        features = embed(other, data_dir=tmp_path)
    np.testing.assert_array_equal(features.x[0], embed(other, data_dir=tmp_path).x[0])
    np.testing.assert_array_equal(np.round(features.x[0] * 255.0), other.images[0].ravel())


def test_a_flipped_byte_is_noticed(images, tmp_path):
    expected = embed(images, data_dir=tmp_path).x.copy()
    (array,) = tmp_path.rglob("embeddings.npy")
    content = bytearray(array.read_bytes())
    content[5000] ^= 1
    array.write_bytes(content)
    with pytest.warns(UserWarning, match=r"embeddings\.npy is not the file"):
        again = embed(images, data_dir=tmp_path)
    np.testing.assert_array_equal(again.x, expected)


def test_manifest(images, tmp_path):
    features = embed(images, data_dir=tmp_path)
    manifest = json.loads(files(tmp_path)["manifest.json"])
    assert manifest == features.manifest
    assert manifest["dataset_fingerprint"] == images.fingerprint
    assert manifest["shape"] == [1797, 64]
    assert json.loads(files(tmp_path)["ids.json"]) == list(images.ids)


def test_half_precision_gives_the_same_clusters(images, tmp_path):
    config = TrainConfig(num_clusters=10, num_heads=4, epochs=5, batch_size=256)
    half, single = (
        train(embed(images, data_dir=tmp_path / dtype, dtype=dtype), config, progress=False)
        for dtype in ("float16", "float32")
    )
    assert cluster_accuracy(half.labels, single.labels) > 0.9


def test_joined_spaces_average_the_similarities(images, tmp_path, monkeypatch):
    pixels = load_backbone("pixels")
    negative = dataclasses.replace(pixels, name="negative", prepare=lambda image: 255 - image)
    monkeypatch.setattr(
        "temi.embeddings.load_backbone", lambda name, **_: {"pixels": pixels}.get(name, negative)
    )
    options = dict(data_dir=tmp_path, num_workers=0)
    parts = [embed(images, name, **options).x[:50] for name in ("pixels", "negative")]
    joined = embed(images, "pixels+negative", **options)
    assert joined.x.shape == (1797, 128)
    assert joined.backbone == "pixels+negative"
    unit = normalize(joined.x[:50], "l2")
    expected = np.mean([normalize(x, "l2") @ normalize(x, "l2").T for x in parts], axis=0)
    np.testing.assert_allclose(unit @ unit.T, expected, atol=2e-3)
    with pytest.raises(ValueError, match="weights='w': None is allowed with several"):
        embed(images, "pixels+negative", weights="w")


def test_one_backbone_at_two_sizes(images, tmp_path):
    options = dict(dtype="float32", progress=False)
    found = embed(images, "pixels@4+pixels@6", data_dir=tmp_path, **options)
    sizes = [embed(images, "pixels", image_size=side, data_dir=tmp_path / str(side), **options)
             for side in (4, 6)]  # fmt: skip
    expected = np.hstack([normalize(size.x, "l2") for size in sizes])
    np.testing.assert_allclose(found.x, expected / 2**0.5, atol=1e-6)
    assert [part["backbone"] for part in found.manifest["spaces"]] == ["pixels@4", "pixels@6"]
    again = load_cached(found.manifest, tmp_path)  # each size has a place of its own
    np.testing.assert_array_equal(again.x, found.x)
    with pytest.raises(ValueError, match="weights='w': backbone='pixels@4' takes none"):
        embed(images, "pixels@4+pixels@6", weights="w")  # of one network, which may take some
    with pytest.raises(ValueError, match="image_size=8: None is allowed, as 'pixels@4' names"):
        embed(images, "pixels@4", image_size=8)
    joined = embed(images, "pixels@4+pixels", image_size=6, data_dir=tmp_path / "b")
    assert joined.x.shape[1] == 3 * (16 + 36)


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
        ([[1.0]], "type list"),
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


def test_spaces_are_joined_by_image(tmp_path):
    """A space may lack an image that another has: here a black one, which no pixels describe."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        picture = rng.integers(1, 255, (8, 8, 3), np.uint8) * (number != 2)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number}.png")
    place = dict(data_dir=tmp_path / "data", progress=False, dtype="float32")
    loaded = load_images(str(folder))
    names = ("pixels@4", "efficientnet_lite0@32")
    with pytest.warns(UserWarning, match="1 of 6 images left out"):
        pixels = embed(loaded, names[0], **place)
    network = embed(loaded, names[1], **place)
    with pytest.warns(UserWarning, match="1 of 6 images left out"):
        both = embed(loaded, "+".join(names), **place)
    assert (len(pixels), len(network)) == (5, 6)
    assert list(both.ids) == list(pixels.ids) == [f"{n}.png" for n in (0, 1, 3, 4, 5)]
    assert list(both.manifest["unreadable"]) == ["2.png"]
    left, right = np.split(both.x, [pixels.x.shape[1]], axis=1)
    np.testing.assert_allclose(left * 2**0.5, normalize(pixels.x, "l2"), atol=1e-6)
    expected = normalize(np.delete(network.x, 2, axis=0), "l2")
    np.testing.assert_allclose(right * 2**0.5, expected, atol=1e-6)
    np.testing.assert_array_equal(load_cached(both.manifest, tmp_path / "data").x, both.x)


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


def test_images_of_another_type(tmp_path):
    for images, kind in (("digits", "str"), (np.ones((2, 8, 8)), "ndarray")):
        with pytest.raises(ValueError, match=f"images of type {kind}: an ImageSet is needed"):
            embed(images, data_dir=tmp_path)


def test_no_such_preparation():
    with pytest.raises(ValueError, match="how='l1': one of 'none', 'l2', 'center-l2' is allowed"):
        normalize(np.ones((2, 3)), "l1")


@pytest.mark.parametrize(("file", "content"), [("manifest.json", ""), ("ids.json", None)])
def test_a_damaged_cache_is_named_and_computed_anew(file, content, tmp_path):
    images = load_images("digits")
    before = embed(images, data_dir=tmp_path)
    path = tmp_path / "embeddings" / "digits" / "pixels" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=rf"{file}|are not in"):
        load_cached(before.manifest, tmp_path) if content is None else read_json(path)
    with pytest.warns(UserWarning, match=rf"computed anew: a file of it is .*{file}"):
        again = embed(images, data_dir=tmp_path)
    np.testing.assert_array_equal(again.x, before.x)


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_an_array_in_a_file_of_several_is_said(shape, tmp_path):
    np.save(tmp_path / "x.npy", np.ones(shape))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"no whole .npy or .npz file \(one array, as in a .npy"):
        load_features(tmp_path / "x.npz")
