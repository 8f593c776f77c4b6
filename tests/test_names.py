"""Names and merges that a gallery hands over."""

import json

import pandas as pd
import pytest

import temi
from temi.names import names_in, read_names


@pytest.fixture
def table():
    """Ten images in three clusters."""
    clusters = pd.Series(range(10)) % 3
    return pd.DataFrame(
        {"path": map(str, range(10)), "cluster": clusters, "confidence": 0.5, "agreement": 1.0,
         "second_choice": (clusters + 1) % 3, "distance": 0.1}
    )  # fmt: skip


def names(given=None, merged=None):
    return {"format": "temi-names-1", "names": given or {}, "merged": merged or {}}


def test_names_and_merges(table, tmp_path):
    (tmp_path / "names.json").write_text(
        json.dumps(names({"0": "cats <b>", "2": "lost"}, {"2": 1, "1": 0}))
    )
    named = temi.apply_names(table, tmp_path / "names.json")
    assert set(named["cluster"]) == {0}
    assert set(named["name"]) == {"cats <b>"}
    assert set(named["second_choice"]) == {-1}
    assert named.drop(columns="name").dtypes.equals(table.dtypes)
    assert set(table["cluster"]) == {0, 1, 2}


def test_a_second_choice_follows_its_merge(table):
    named = temi.apply_names(table, names({0: "cats"}, {2: 1}))
    pairs = set(zip(named["cluster"], named["second_choice"], named["name"], strict=True))
    assert pairs == {(0, 1, "cats"), (1, -1, "1"), (1, 0, "1")}


def test_new_images_need_not_have_every_cluster(table):
    few = table[:1]
    with pytest.raises(ValueError, match="no cluster 2 in the table; for new images give temi"):
        temi.apply_names(few, names({2: "dogs"}))
    assert temi.apply_names(few, names({2: "dogs"}), num_clusters=3)["name"].tolist() == ["0"]
    with pytest.raises(ValueError, match=r"there is no cluster 3 in the table$"):
        temi.apply_names(few, names({3: "dogs"}), num_clusters=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "names='.*names.json': holds no JSON"),
        (b"\xff\xfe", "holds no JSON"),
        ("[" * 100_000, "holds no JSON"),
        ("[]", 'a JSON object with "format": "temi-names-1" is allowed'),
        ({"names": {"0": "cats"}}, 'a JSON object with "format"'),
        (names() | {"names": ["cats"]}, "'names' is \\['cats'\\]; an object is allowed"),
        (names({"zero": "cats"}), "'zero' is no cluster"),
        (names({"-1": "cats"}), "'-1' is no cluster"),
        (names({"0": " "}), "cluster 0 is named ' '; a line of text is allowed"),
        (names({"0": 5}), "cluster 0 is named 5; a line of text is allowed"),
        (names({"0": "\ud800"}), "a line of text is allowed"),
        (names(merged={"0": None}), "None is no cluster"),
        (names(merged={"0": True}), "True is no cluster"),
        (names(merged={"0": 0}), "merged in a circle, 0 into 0"),
        (names(merged={"0": 1, "1": 2, "2": 0}), "merged in a circle, 0 into 1 into 2 into 0"),
        (names(merged={"0": 1, "1": 2, "2": 1}), "merged in a circle, 0 into 1 into 2 into 1"),
        (names({"7": "cats"}), "there is no cluster 7 in the table"),
        (names(merged={"0": 7}), "there is no cluster 7 in the table"),
    ],
)  # fmt: skip
def test_other_names_are_refused_in_one_line(table, tmp_path, content, message):
    path = tmp_path / "names.json"
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        temi.apply_names(table, path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_of_names(table):
    with pytest.raises(ValueError, match=r"names='nowhere\.json': No such file or directory"):
        temi.apply_names(table, "nowhere.json")


@pytest.mark.parametrize("key", ["1.5", "\u0661", "1" * 10, "1\n"])
def test_other_keys_are_refused(table, key):
    with pytest.raises(ValueError, match="is no cluster; whole numbers from 0 are allowed"):
        temi.apply_names(table, names({key: "cats"}))


@pytest.mark.parametrize("name", ["\udc00", "a\rb", "a\n"])
def test_a_name_is_a_line_of_text(table, name):
    with pytest.raises(ValueError, match="a line of text is allowed"):
        temi.apply_names(table, names({"0": name}))


def test_names_from_a_file_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMI_HOME", str(tmp_path))
    (tmp_path / "names.json").write_text(json.dumps(names({"0": "cats"})))
    assert read_names("names.json")[0] == {0: "cats"}


def test_clusters_of_one_name_keep_it(table):
    named = temi.apply_names(table, names({"0": "cats", "2": "cats"}))
    assert names_in(named) == {0: "cats", 2: "cats"}


def test_a_second_choice_alone_may_be_named(table):
    few = table[:1]  # cluster 0, second choice 1
    assert temi.apply_names(few, names({1: "dogs"}))["name"].tolist() == ["0"]
    assert temi.apply_names(few, names(merged={1: 0}))["second_choice"].tolist() == [-1]


def test_numbers_of_three_digits(table):
    named = temi.apply_names(table.assign(cluster=123), names({"123": "cats"}))
    assert set(named["name"]) == {"cats"}


def test_names_that_a_file_does_not_keep_are_none(table, tmp_path):
    missing = table.assign(name=["cats" if c == 0 else None for c in table["cluster"]])
    assert names_in(missing) == {0: "cats"}
    assert names_in(table.assign(name=table["cluster"].map({1: 1.5}))) == {1: "1.5"}
    named = temi.apply_names(table, names({"0": "NA", "1": "1990"}))  # pandas reads the former as
    temi.write_assignments(named, tmp_path)  # missing, so the others as 1990.0 and 2.0
    assert names_in(pd.read_csv(tmp_path / "assignments.csv")) == {1: "1990"}
    assert names_in(pd.read_parquet(tmp_path / "assignments.parquet")) == {0: "NA", 1: "1990"}


def test_clusters_with_gaps_are_refused():
    none = {"format": "temi-names-1", "names": {}, "merged": {}}
    clusters = pd.array([0, None, 1], dtype="Int64")
    table = pd.DataFrame({"cluster": clusters, "second_choice": [1, 0, 0]})
    with pytest.raises(ValueError, match=r"^table: cluster has gaps; whole numbers are allowed"):
        temi.apply_names(table, none)
    assert temi.apply_names(table.dropna(), none)["cluster"].tolist() == [0, 1]
