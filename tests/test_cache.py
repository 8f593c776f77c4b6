import dataclasses
import errno
import json
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from temi.backbones import load_backbone
from temi.cache import embed, load_cached
from temi.config import TrainConfig
from temi.data import load_images
from temi.embeddings import normalize
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
        "temi.cache.load_backbone", lambda name, **_: {"pixels": pixels}.get(name, negative)
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


def test_images_of_another_type(tmp_path):
    for images, kind in (("digits", "str"), (np.ones((2, 8, 8)), "ndarray")):
        with pytest.raises(ValueError, match=f"images of type {kind}: an ImageSet is needed"):
            embed(images, data_dir=tmp_path)


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


def test_joined_spaces_keep_each_image_its_label(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    for number in range(6):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture = rng.integers(1, 255, (8, 8, 3), np.uint8) * (number != 2)
        Image.fromarray(picture.astype(np.uint8)).save(folder / "ab"[number % 2] / f"{number}.png")
    loaded = load_images(str(folder), labels="folders")
    with pytest.warns(UserWarning, match="1 of 6 images left out"):
        both = embed(loaded, "efficientnet_lite0@32+pixels@4", data_dir=tmp_path, progress=False)
    assert [both.class_names[label] for label in both.labels] == [name[0] for name in both.ids]


def test_images_that_may_be_read_again_are_embedded(images, tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(6):
        Image.fromarray(images.images[row]).save(folder / f"{row}.png")
    stat, denied = os.stat, str(folder / "2.png")

    def closed(path, **options):
        if str(path) == denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return stat(path, **options)

    photos = load_images(folder)
    fingerprint = photos.fingerprint
    monkeypatch.setattr("temi.image_files.os.stat", closed)
    opened = open

    def refused(path, *arguments, **options):  # while the mode bits say that all may read it
        closed(path)
        return opened(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr(type(photos), "fingerprint", fingerprint)  # permissions do not change it
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="Permission denied") as warned:
            assert len(embed(photos, data_dir=tmp_path)) == 5
        (said,) = [str(warning.message) for warning in warned]
        assert said.startswith("1 of 6 images left out, the first, 2.png: Permission denied")
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"images that could not be read can be now \(2\.png"):
        assert len(embed(photos, data_dir=tmp_path)) == 6
    assert embed(photos, data_dir=tmp_path).ids == photos.ids


def test_a_size_that_numpy_computed(images, tmp_path):
    few = images.keep(images.ids[:20])
    features = embed(few, image_size=np.int64(6), data_dir=tmp_path)
    assert features.x.shape == (20, 108)
    json.dumps(features.manifest)
    with pytest.raises(ValueError, match="image_size=True: a whole number"):
        embed(few, image_size=True, data_dir=tmp_path)
