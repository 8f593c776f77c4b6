import dataclasses
import errno
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_names import names

import temi
from temi import ensemble
from temi.data import ImageSet
from temi.embeddings import normalize
from temi.export import check_replaceable
from temi.image_files import ImageFiles

HOSTILE = ("a b.png", "a\"b'c.png", "<script>alert(1)<|script>.png", "né 日本.png", "=1+1,2.png",
           "line\nbreak.png", os.fsdecode(b"no-utf8-\xff.png"), "back\\slash.png")  # fmt: skip


@pytest.fixture(scope="module")
def features():
    return temi.embed(temi.load_images("digits"))


@pytest.fixture(scope="module")
def run(features):
    config = temi.TrainConfig(num_clusters=10, num_heads=4, epochs=2)
    return temi.train(features, config, progress=False)


@pytest.fixture(scope="module")
def table(run, features):
    return temi.assignments(run, features)


def test_an_array_has_numbers_for_names(run, features, table):
    found = temi.assignments(run, np.asarray(features.x))
    assert found["path"].tolist()[:2] == ["0", "1"]
    pd.testing.assert_frame_equal(found.drop(columns="path"), table.drop(columns="path"))


def test_a_table_takes_no_more_than_some_thousand_prepared_rows(run, features, monkeypatch):
    x = np.tile(features.x, (10, 1))  # 17,970 rows
    lengths = []

    def counted(rows, *args, **options):
        lengths.append(len(rows))
        return normalize(rows, *args, **options)

    monkeypatch.setattr("temi.rows.normalize", counted)
    monkeypatch.setattr("temi.embeddings.checksum", lambda _: 1 / 0)  # of no use here
    table = temi.assignments(run, x)
    temi.centers(run, x)
    run.soft_consensus(x)
    assert max(lengths) == 8192
    assert table["cluster"].tolist() == 10 * run.labels.tolist()


def part_of(features, rows):
    ids = tuple(features.ids[row] for row in rows)
    return dataclasses.replace(features, x=features.x[rows], ids=ids, labels=None)


@pytest.fixture
def photos(tmp_path):
    """A folder of hostile names, two of one name in different sub-folders; and a table of them."""
    root = tmp_path / "photos"
    names = [*HOSTILE, "x/same.png", "y/same.png"]
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6), value * 20, np.uint8)).save(root / name)
    images = temi.load_images(str(root))
    clusters = np.arange(len(images)) % 3
    table = pd.DataFrame(
        {"path": images.ids, "cluster": clusters, "confidence": 0.5, "agreement": 1.0,
         "second_choice": (clusters + 1) % 3, "distance": 0.1}
    )  # fmt: skip
    return images, table


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# the table


def test_columns(table, features):
    assert list(table) == [
        "path", "cluster", "confidence", "agreement", "second_choice", "distance"
    ]  # fmt: skip
    assert table["path"].tolist() == list(features.ids)
    assert table["cluster"].dtype == table["second_choice"].dtype == np.int64


def test_clusters_are_those_of_the_run(table, run):
    np.testing.assert_array_equal(table["cluster"], run.labels)
    np.testing.assert_array_equal(table["agreement"], run.agreement)


def test_against_plain_numpy(table, run, features):
    mean = run.predict_proba(features)
    rows = np.arange(len(table))
    np.testing.assert_allclose(table["confidence"], mean[rows, run.labels], atol=1e-6)
    others = mean.copy()
    others[rows, run.labels] = -1
    np.testing.assert_array_equal(table["second_choice"], others.argmax(axis=1))

    x = features.x.astype(np.float64)
    x = x - x.mean(axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    middles = np.stack([x[run.labels == c].mean(axis=0) for c in range(10)])
    unit = middles / np.linalg.norm(middles, axis=1, keepdims=True)
    distance = 1 - (x * unit[run.labels]).sum(axis=1)
    np.testing.assert_allclose(table["distance"], distance, atol=1e-5)
    np.testing.assert_allclose(temi.centers(run, features), middles, atol=1e-5)


@pytest.mark.parametrize(("limit", "value"), [("CHUNK", 100), ("LOGITS", 4_000)])
def test_many_chunks_are_one(monkeypatch, table, run, features, limit, value):
    monkeypatch.setattr(ensemble, limit, value)
    again = temi.assignments(run, features)
    pd.testing.assert_frame_equal(again, table, rtol=0, atol=1e-6)


def test_new_images_are_measured_from_the_centres_of_the_training(table, run, features):
    rows = [3, 700, 12]
    middles = temi.centers(run, features)
    later = temi.assignments(run, part_of(features, rows), middles)
    expected = table.iloc[rows].reset_index(drop=True)
    pd.testing.assert_frame_equal(later, expected, rtol=0, atol=1e-6)
    alone = temi.assignments(run, part_of(features, rows))
    assert not np.allclose(alone["distance"], expected["distance"])


def test_a_cluster_without_images_has_no_centre(run, features):
    one = part_of(features, [0])
    middles = temi.centers(run, one)
    full = run.labels[0]
    assert np.isfinite(middles[full]).all()
    assert np.isnan(np.delete(middles, full, axis=0)).all()
    other = part_of(features, np.flatnonzero(run.labels != full)[:1])
    assert temi.assignments(run, other, middles)["distance"].isna().all()


def test_the_second_choice_of_one_cluster_is_none(run, features):
    """Of one cluster, as the estimator makes it."""
    heads = temi.MultiHead(run.teacher.weight1.shape[2], 1, 4).requires_grad_(False)
    config = dataclasses.replace(run.config)
    object.__setattr__(config, "num_clusters", 1)
    labels = np.zeros((4, len(features)), np.int64)
    single = temi.Run.from_heads(config, {}, heads, run.mean, run.axes, labels, [], [], {})
    table = temi.assignments(single, features)
    assert (table["second_choice"] == -1).all()
    assert (table["cluster"] == 0).all()
    np.testing.assert_allclose(table["confidence"], 1)


def test_probabilities_are_held_in_chunks(monkeypatch, run, features):
    """1M images x 1000 clusters would be gigabytes."""
    largest = 0
    plain = torch.Tensor.scatter

    def watched(tensor, *arguments):
        nonlocal largest
        largest = max(largest, len(tensor))
        return plain(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "scatter", watched)
    monkeypatch.setattr(ensemble, "CHUNK", 256)
    temi.assignments(run, features)
    assert largest == 256


# its files


def test_csv_reads_back(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pd.DataFrame, "to_parquet", lambda *_, **__: None)
    _, table = photos
    temi.write_assignments(table, tmp_path / "new" / "out")
    back = pd.read_csv(tmp_path / "new" / "out" / "assignments.csv")
    pd.testing.assert_frame_equal(back, table)


def test_parquet_reads_back(photos, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow, which writes Parquet, is not installed")
    _, table = photos
    raw = table.assign(path=[f"{name}\n,\"' <script>" for name in table["path"]])
    for content in (table, raw):
        temi.write_assignments(content, tmp_path)
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "assignments.parquet"), content)
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "assignments.csv"), content)


def test_a_full_disk_leaves_the_table_as_it_was(photos, tmp_path, monkeypatch):
    _, table = photos
    (tmp_path / "assignments.csv").write_text("before")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="No space left on device; what stood there before is as it"):
        temi.write_assignments(table, tmp_path)
    assert (tmp_path / "assignments.csv").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"assignments.csv", "photos"}


# sorted folders


@pytest.mark.parametrize("how", ["copy", "hardlink", "symlink"])
def test_sorted(photos, tmp_path, how):
    images, table = photos
    before = contents(tmp_path / "photos")
    given = names({"0": "../Black cats & <b>", "2": "日本"}, {"1": 0})
    temi.sort_images(table, images, tmp_path / "sorted", how, given)
    folders = {0: "0-Black-cats-b", 1: "0-Black-cats-b", 2: "2-日本"}
    expected = {
        f"{folders[cluster]}/{raw}": before[raw]
        for raw, cluster in zip(images.images.names, table["cluster"], strict=True)
    }
    found = contents(tmp_path / "sorted")
    assert found == expected | {".sorted-by-temi": b""}
    assert contents(tmp_path / "photos") == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "sorted"}
    for raw, cluster in zip(images.images.names, table["cluster"], strict=True):
        path, original = tmp_path / "sorted" / folders[cluster] / raw, tmp_path / "photos" / raw
        assert path.is_symlink() == (how == "symlink")
        assert path.samefile(original) == (how != "copy")


def test_numbers_are_of_one_width(photos, tmp_path):
    images, table = photos
    temi.sort_images(table.assign(cluster=[3, *[12] * 9]), images, tmp_path / "sorted")
    folders = {path.name for path in (tmp_path / "sorted").iterdir() if path.is_dir()}
    assert folders == {"03", "12"}


def test_names_of_the_table_are_used(photos, tmp_path):
    images, table = photos
    named = temi.apply_names(table, names({1: "cats"}))
    temi.sort_images(named, images, tmp_path / "sorted")
    folders = {path.name for path in (tmp_path / "sorted").iterdir() if path.is_dir()}
    assert folders == {"0", "1-cats", "2"}


def test_images_without_files_become_png(table, tmp_path):
    images = temi.load_images("digits")
    few = table[:20]
    temi.sort_images(few, images, tmp_path / "sorted")
    for row, cluster in enumerate(few["cluster"]):
        path = tmp_path / "sorted" / str(cluster) / f"{images.ids[row]}.png"
        np.testing.assert_array_equal(np.array(Image.open(path)), images.images[row])
    with pytest.raises(ValueError, match="table: no rows; a table of one image or more"):
        temi.sort_images(few[:0], images, tmp_path / "sorted")
    assert len(list((tmp_path / "sorted").rglob("*.png"))) == 20
    with pytest.raises(ValueError, match="how='symlink': 'digits' holds no files to link to"):
        temi.sort_images(few, images, tmp_path / "links", "symlink")
    assert not (tmp_path / "links").exists()


def test_an_earlier_result_is_replaced_and_nothing_else(photos, tmp_path):
    images, table = photos
    folder = tmp_path / "sorted"
    folder.mkdir()
    temi.sort_images(table, images, folder)  # an empty one is taken
    (folder / "0" / "stray.txt").touch()
    temi.sort_images(table[:2], images, folder)
    assert len(contents(folder)) == 3
    (folder / ".sorted-by-temi").unlink()
    before = contents(folder)
    with pytest.raises(ValueError, match="holds files that sort_images did not write"):
        temi.sort_images(table, images, folder)
    assert contents(folder) == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is no folder"):
        temi.sort_images(table, images, tmp_path / "file")


def test_what_a_killed_call_left_is_cleared(photos, tmp_path):
    images, table = photos
    temi.sort_images(table, images, tmp_path / "sorted")
    shutil.copytree(tmp_path / "sorted", tmp_path / ".sorted.part")
    temi.sort_images(table, images, tmp_path / "sorted")
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "sorted"}


@pytest.mark.parametrize("place", ["photos", "photos/x/sorted", "."])
def test_the_originals_own_folder_is_refused(photos, tmp_path, place):
    images, table = photos
    (tmp_path / ".sorted-by-temi").touch()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds files|outside of the images' own folder"):
        temi.sort_images(table, images, tmp_path / place)
    assert contents(tmp_path) == before


def test_originals_behind_a_link_are_not_replaced(photos, tmp_path):
    images, table = photos
    temi.sort_images(table, images, tmp_path / "sorted")
    before = contents(tmp_path / "sorted")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "here").symlink_to(tmp_path / "sorted")
    again = temi.load_images(str(tmp_path / "linked"))
    with pytest.raises(OSError, match="lies in the folder that is to be replaced"):
        temi.sort_images(table.assign(path=again.ids), again, tmp_path / "sorted", "symlink")
    assert contents(tmp_path / "sorted") == before


@pytest.mark.parametrize("name", ["../out.png", "x/../../../out.png", "/out.png", ".."])
def test_no_name_leads_out_of_the_folder(photos, tmp_path, name):
    images, table = photos
    absolute = str(tmp_path / "out.png") if name.startswith("/") else name
    files = ImageFiles(images.images.root, (absolute,))
    hostile = ImageSet("hostile", files, ("out.png",))
    with pytest.raises(ValueError, match="leads out of the folder"):
        temi.sort_images(table[:1].assign(path="out.png"), hostile, tmp_path / "sorted")
    array = ImageSet("hostile", np.zeros((1, 4, 4), np.uint8), (f"{absolute}/../../x",))
    with pytest.raises(ValueError, match="leads out of the folder"):
        temi.sort_images(table[:1].assign(path=array.ids), array, tmp_path / "sorted")
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def test_a_full_disk_leaves_what_was_there(photos, tmp_path, monkeypatch):
    images, table = photos
    temi.sort_images(table[:2], images, tmp_path / "sorted")
    before, plain, calls = contents(tmp_path / "sorted"), shutil.copy2, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*arguments)

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left on device; nothing of it was left"):
        temi.sort_images(table, images, tmp_path / "sorted")
    assert contents(tmp_path / "sorted") == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "sorted"}


def test_a_failed_exchange_is_undone(photos, tmp_path, monkeypatch):
    images, table = photos
    temi.sort_images(table[:2], images, tmp_path / "sorted")
    before, plain = contents(tmp_path / "sorted"), type(tmp_path).rename

    def failing(self, target):
        if self.name.endswith(".part"):
            raise OSError(errno.EACCES, "Permission denied")
        return plain(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(OSError, match="Permission denied"):
        temi.sort_images(table, images, tmp_path / "sorted")
    assert contents(tmp_path / "sorted") == before


def test_hard_links_between_file_systems(photos, tmp_path, monkeypatch):
    images, table = photos

    def other_device(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_device)
    with pytest.raises(OSError, match="no hard links between file systems, give how='copy' or"):
        temi.sort_images(table, images, tmp_path / "sorted", "hardlink")
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


@pytest.mark.skipif(os.name == "nt" or not os.geteuid(), reason="root may write anywhere")
def test_a_read_only_folder(photos, tmp_path):
    images, table = photos
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with pytest.raises(OSError, match="Permission denied"):
        temi.sort_images(table, images, closed / "sorted")
    with pytest.raises(OSError, match="Permission denied"):
        temi.write_assignments(table, closed)
    assert not list(closed.iterdir())


def test_other_arguments_are_refused(photos, tmp_path):
    images, table = photos
    with pytest.raises(ValueError, match="how='move': one of 'copy', 'hardlink', 'symlink'"):
        temi.sort_images(table, images, tmp_path / "sorted", "move")
    with pytest.raises(ValueError, match="ids: 'nobody' is no image of"):
        temi.sort_images(table.assign(path="nobody"), images, tmp_path / "sorted")
    (tmp_path / "photos" / "x" / "same.png").unlink()
    with pytest.raises(OSError, match="no such image file any more"):
        temi.sort_images(table, images, tmp_path / "sorted")
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def test_a_table_of_another_kind_is_refused_in_one_line(photos, run, tmp_path):
    images, _ = photos
    other = pd.DataFrame({"id": images.ids, "cluster": 0, "agreement": 1.0})
    with pytest.raises(ValueError, match="table: has no path; a table of temi"):
        temi.sort_images(other, images, tmp_path / "sorted")
    with pytest.raises(ValueError, match="table: has no second_choice"):
        temi.apply_names(other, {"format": "temi-names-1"})
    with pytest.raises(ValueError, match="table: has no path, second_choice, confidence, distance"):
        temi.write_gallery(tmp_path / "page.html", other, images)
    assert not list(tmp_path.glob("*.html"))
    gaps = pd.DataFrame({"path": images.ids, "cluster": 0.0})
    with pytest.raises(ValueError, match=r"cluster is float64; .* table\['cluster'\]\.astype"):
        temi.sort_images(gaps, images, tmp_path / "sorted")


def test_arguments_of_another_type_are_refused_in_one_line(photos, tmp_path):
    images, _ = photos
    table = pd.DataFrame({"path": images.ids, "cluster": 0, "second_choice": -1, "confidence": 1.0,
                          "agreement": 1.0, "distance": 0.0})  # fmt: skip
    page, folder = tmp_path / "page.html", tmp_path / "sorted"
    for no_table in ("clusters/assignments.csv", None, list(images.ids)):
        with pytest.raises(ValueError, match=r"table of type .*: a DataFrame is needed"):
            temi.apply_names(no_table, {"format": "temi-names-1"})
        with pytest.raises(ValueError, match=r"table of type .*: a DataFrame is needed"):
            temi.sort_images(no_table, images, folder)
        with pytest.raises(ValueError, match=r"table of type .*: a DataFrame is needed"):
            temi.write_gallery(page, no_table, images)
    for write in (temi.sort_images, lambda *of: temi.write_gallery(of[2], of[0], of[1])):
        with pytest.raises(ValueError, match=r"images of type .*Path: an ImageSet is needed"):
            write(table, tmp_path / "photos", tmp_path / "out")
    with pytest.raises(ValueError, match='names: a JSON object with "format"'):
        temi.apply_names(table, ["cats", "dogs"])
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def test_names_that_are_numbers_survive_a_file(photos, tmp_path):
    images, table = photos
    names = {"format": "temi-names-1", "names": {str(table["cluster"].iloc[0]): "1990"}}
    temi.write_assignments(temi.apply_names(table, names), tmp_path)
    again = pd.read_csv(tmp_path / "assignments.csv")
    temi.sort_images(again, images, tmp_path / "sorted")
    assert any(path.name.endswith("-1990") for path in (tmp_path / "sorted").iterdir())


def test_what_others_left_beside_the_folder_stays(tmp_path):
    (tmp_path / ".sorted.old").mkdir()
    (tmp_path / ".sorted.old" / "mine.txt").touch()
    with pytest.raises(ValueError, match="did not write"):
        check_replaceable(tmp_path / "sorted")


def test_folders_below_the_users_own(photos, tmp_path, monkeypatch):
    images, table = photos
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    temi.write_assignments(table, "~/out")
    temi.sort_images(table, images, "~/sorted")
    found = {path.name for path in (tmp_path / "home").iterdir()}
    assert found == {"out", "sorted"}


def test_links_into_the_originals(photos, tmp_path):
    images, table = photos
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    before = contents(tmp_path / "photos")
    with pytest.raises(ValueError, match="outside of the images' own folder"):
        temi.sort_images(table, images, tmp_path / "link" / "sorted")
    assert contents(tmp_path / "photos") == before


def test_links_are_no_folders(photos, tmp_path):
    images, table = photos
    (tmp_path / "empty").mkdir()
    for target in ("empty", "nowhere"):
        (tmp_path / target[0]).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match="is no folder; give another one"):
            temi.sort_images(table, images, tmp_path / target[0])


def test_an_image_that_is_in_the_table_twice(photos, tmp_path):
    images, table = photos
    with pytest.raises(OSError, match="two images of one name"):
        temi.sort_images(pd.concat([table, table]), images, tmp_path / "sorted")


def test_long_names_are_cut(photos, tmp_path):
    images, table = photos
    named = names({"10": "x" * 300})
    temi.sort_images(table.assign(cluster=[3, *[10] * 9]), images, tmp_path / "sorted", names=named)
    folders = {path.name for path in (tmp_path / "sorted").iterdir() if path.is_dir()}
    assert folders == {"03", "10-" + "x" * 50}


def test_no_name_is_the_folder_itself(photos, tmp_path):
    images, table = photos
    hostile = ImageSet("hostile", ImageFiles(images.images.root, ("x/..",)), ("a",))
    with pytest.raises(ValueError, match="leads out of the folder"):
        temi.sort_images(table[:1].assign(path="a"), hostile, tmp_path / "sorted")


def test_the_table_begins_with_its_columns(photos, tmp_path):
    temi.write_assignments(photos[1], tmp_path)
    assert (tmp_path / "assignments.csv").read_bytes().startswith(b"path,cluster,")


def test_a_probability_of_zero_is_a_choice(run, features, table, monkeypatch):
    sure = torch.eye(10)[torch.from_numpy(run.labels)]
    monkeypatch.setattr(type(run), "mean_probs", lambda *_: iter([sure]))
    second = temi.assignments(run, features)["second_choice"]
    assert (second >= 0).all()
    assert (second != table["cluster"]).all()


def test_a_folder_beside_the_current_one(photos, tmp_path, monkeypatch):
    images, table = photos
    monkeypatch.chdir(tmp_path / "photos" / "x")
    temi.sort_images(table, images, "../../sorted")
    assert len(contents(tmp_path / "sorted")) == 1 + len(images)


def test_centers_of_another_run_are_refused(run, features, monkeypatch):
    middles = temi.centers(run, features)
    middles.setflags(write=False)  # as those mapped from a file
    found = temi.assignments(run, features, middles)
    pd.testing.assert_frame_equal(temi.assignments(run, features, middles.tolist()), found)
    monkeypatch.setattr("temi.ensemble.head_labels", lambda *_: 1 / 0)  # not asked any more
    with pytest.raises(ValueError, match=r"centers of shape \(9, 64\): \(10, 64\) is allowed, as"):
        temi.assignments(run, features, middles[:9])
