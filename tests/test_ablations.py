"""The table of ablations: what is there is skipped, what no longer holds is done again."""

import json

import numpy as np
import pandas as pd
import pytest

from benchmarks import ablations, digits_scores
from temi import plots
from temi.metrics import evaluate, stability


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the script on tiny data; returns its table, and the names of what was computed."""
    monkeypatch.setenv("TEMI_HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(3), 40)
    x = rng.normal(size=(3, 8))[classes] * 3 + rng.normal(size=(120, 8))
    np.savez(tmp_path / "tiny.npz", X=x.astype(np.float32), y=classes)
    monkeypatch.setattr(ablations, "SWEEPS", {"recipe": ("fast",), "beta": (0.6, 0.9)})
    base = {"device": "cpu", "epochs": 1, "num_heads": 2, "batch_size": 16, "num_neighbors": 5}
    monkeypatch.setattr(ablations, "BASE", base)
    out, computed, measure = tmp_path / "table.csv", [], ablations.measure

    def noting(job):
        computed.append(job.label)
        return measure(job)

    monkeypatch.setattr(ablations, "measure", noting)

    def call(*options):
        computed.clear()
        source = f"tiny/random={tmp_path / 'tiny.npz'}"
        given = ["--features", source, "--only", "tiny/*", "--out", str(out), "--jobs", "1"]
        ablations.main([*given, *options])
        return ablations.read(out), list(computed)

    return call


@pytest.fixture(autouse=True)
def no_digits(monkeypatch):
    load = ablations.load

    def without(options):
        monkeypatch.setattr(ablations.temi, "load_images", lambda name: None)
        monkeypatch.setattr(ablations.temi, "embed", lambda *args, **options: None)
        return load(options)[1:]

    monkeypatch.setattr(ablations, "load", without)


def test_rows_are_complete_and_kept(run):
    table, computed = run("--seeds", "2")
    assert len(table) == len(computed) == 2 * (2 + 2)
    assert not table.duplicated(ablations.IDENTITY).any()
    trained = table[table["method"] == "temi"]
    assert trained.drop(columns="failed").notna().all(axis=None)
    assert trained["information"].between(0, 1).all()
    settings = trained["settings"].map(json.loads)
    assert [s["beta"] for s in settings] == [0.6, 0.9] * 2
    assert settings.map(lambda s: s["epochs"] == 1 and s["dataset"] == "tiny").all()
    assert not table["command"].str.contains("/tmp").any()
    again, computed = run("--seeds", "2")
    assert computed == []
    pd.testing.assert_frame_equal(table, again)


def test_scores_are_those_of_the_labels_that_are_kept(run, tmp_path):
    table, _ = run("--seeds", "2")
    rows = table[(table["method"] == "temi") & (table["setting"] == "beta")]
    labels = [np.load(ablations.cache(row))["labels"] for row in rows.to_dict("records")]
    classes = np.load(tmp_path / "tiny.npz")["y"]
    for (_, row), found in zip(rows.iterrows(), labels, strict=True):
        assert row["acc"] == pytest.approx(evaluate(found, classes)["acc"], abs=1e-4)
    assert rows["stability"].tolist() == pytest.approx([stability(labels)] * 2, abs=1e-4)


def test_a_command_of_a_row_repeats_it_alone(run):
    table, _ = run("--seeds", "2")
    command = table[table["method"] == "temi"]["command"].iloc[-1].split()
    again, computed = run("--seeds", "2", "--only", command[command.index("--only") + 1], "--again")
    assert computed == ["tiny/random/temi/beta=0.9/1"]
    order, timing = ablations.IDENTITY, ["seconds"]
    pd.testing.assert_frame_equal(
        table.drop(columns=timing).sort_values(order, ignore_index=True),
        again.drop(columns=timing).sort_values(order, ignore_index=True),
    )


def test_a_changed_setting_redoes_what_it_is_in(run, monkeypatch):
    before, _ = run("--seeds", "1")
    monkeypatch.setitem(ablations.BASE, "num_heads", 3)
    table, computed = run("--seeds", "1")
    assert computed == ["tiny/random/temi/recipe=fast/0", "tiny/random/temi/beta=0.9/0"]
    assert len(table) == len(before)
    trained = table[table["method"] == "temi"]
    assert all(json.loads(text)["num_heads"] == 3 for text in trained["settings"])
    monkeypatch.setitem(ablations.SWEEPS, "beta", (0.6, 0.8, 0.9))
    assert run("--seeds", "1")[1] == ["tiny/random/temi/beta=0.8/0"]


def test_changed_code_redoes_the_rows_that_it_makes(run, monkeypatch):
    run("--seeds", "1")
    code = ablations.CODE["kmeans"]
    monkeypatch.setitem(ablations.CODE, "kmeans", (*code, evaluate))
    _, computed = run("--seeds", "1")
    assert len(computed) == 2
    assert all("/kmeans-" in name for name in computed)


def test_rearranged_code_is_verified_on_some_rows(run, monkeypatch):
    before, _ = run("--seeds", "2")
    for method, parts in ablations.CODE.items():
        monkeypatch.setitem(ablations.CODE, method, (*parts, stability))
    table, computed = run("--seeds", "2", "--verify", "1")
    methods = sorted(name.split("/")[2] for name in computed)
    assert methods == ["kmeans-center-l2", "kmeans-none", "temi"]  # one row of each, and no more
    assert not set(table["code"]) & set(before["code"])
    pd.testing.assert_frame_equal(table.drop(columns="code"), before.drop(columns="code"))
    labels = [ablations.cache(row) for row in table.to_dict("records")]
    assert all(path.exists() for path in labels)
    assert run("--seeds", "2")[1] == []


def test_code_that_computes_something_else_is_not_verified(run, monkeypatch, capsys):
    before, _ = run("--seeds", "1")
    monkeypatch.setitem(ablations.CODE, "temi", (*ablations.CODE["temi"], stability))
    silhouette = ablations.temi.silhouette
    monkeypatch.setattr(ablations.temi, "silhouette", lambda *x: silhouette(*x) + 0.01)
    table, computed = run("--seeds", "1", "--verify", "1")
    assert len(computed) == 1 + 2  # the verified one, and then both
    assert "differs in silhouette" in capsys.readouterr().out
    trained = table["method"] == "temi"
    difference = table["silhouette"] - before["silhouette"]
    assert difference[trained].to_numpy() == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("elsewhere", [1, 2])
def test_rows_of_another_device_hold_with_those_of_this_one(
    run, tmp_path, monkeypatch, capsys, elsewhere
):
    before, _ = run("--seeds", "2")
    trained = before["method"] == "temi"
    before.loc[trained & (before["seed"] >= 2 - elsewhere), "device"] = "NVIDIA X"
    before.to_csv(tmp_path / "table.csv", index=False)
    monkeypatch.setitem(ablations.CODE, "temi", (*ablations.CODE["temi"], stability))
    table, computed = run("--seeds", "2", "--verify", "1")
    if elsewhere == 1:  # seed: the other was trained here, and one of its rows is trained again
        assert [name[-2:] for name in computed] == ["/0"]
        assert (table["device"] == "NVIDIA X").sum() == 2
    else:  # none was
        assert "4 rows of temi were all trained on another --device" in capsys.readouterr().out
        assert len(computed) == 4


def test_changed_embeddings_redo_everything(run, tmp_path):
    _, first = run("--seeds", "1")
    content = dict(np.load(tmp_path / "tiny.npz"))
    np.savez(tmp_path / "tiny.npz", X=content["X"] + np.float32(0.5), y=content["y"])
    table, computed = run("--seeds", "1")
    assert computed == first
    assert len(table) == len(first)


def test_time_that_is_over_starts_nothing(run):
    table, computed = run("--max-minutes", "0")
    assert computed == []
    assert table.empty


def test_a_kill_between_two_rows_leaves_whole_ones(run, monkeypatch):
    count, store = [], ablations.store

    def killed(*arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        store(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ablations, "store", killed)
        with pytest.raises(KeyboardInterrupt):
            run("--seeds", "1")
    table, computed = run("--seeds", "1")
    assert len(computed) == 2
    assert len(table) == 4


def test_a_collapse_is_a_row(run, monkeypatch):
    def collapse(*arguments, **options):
        raise ablations.DivergenceError(1, None, [0, 1], 0.1)

    monkeypatch.setattr(ablations.temi, "train", collapse)
    table, _ = run("--seeds", "1")
    failed = table[table["failed"].notna()]
    assert set(failed["method"]) == {"temi"}
    assert failed["acc"].isna().all()
    assert run("--seeds", "1")[1] == []


def test_code_version_sees_code_and_no_words(tmp_path, monkeypatch):
    source = 'def f(x):\n    """Words."""\n    # more\n    return x + 1  # and more\n'
    check = (
        "    if x < 0:\n        raise ValueError(\n            x\n        )\n"
        "    a.check_it(x)\n    a.show_it(x)\n"
    )
    branch = "    if x < 0:\n        raise ValueError\n    else:\n        x = 0\n"
    versions = {}
    for name, text in {
        "as it is": source,
        "other words": source.replace("ore", "any").replace("Words", "Two\n\n    lines"),
        "checked": source.replace("    # more\n", check),
        "other code": source.replace("+ 1", "+ 2"),
        "a branch": source.replace("    # more\n", branch),
        "a call": source.replace("    # more\n", "    x = check_it(x)\n"),
    }.items():
        (tmp_path / f"code_{len(versions)}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        module = __import__(f"code_{len(versions)}")
        versions[name] = ablations.code_version((module.f,)), ablations.code_version((module,))
    assert versions["as it is"] == versions["other words"] == versions["checked"]
    for name in ("other code", "a branch", "a call"):
        assert versions["as it is"][0] != versions[name][0]
        assert versions["as it is"][1] != versions[name][1]


def test_no_row_of_that_name(run):
    with pytest.raises(SystemExit, match="--only tiny/x: no row fits"):
        run("--only", "tiny/x")


def test_a_sweep_is_drawn_with_the_recipe_in_its_place():
    rows = [("temi", "recipe", "fast", 0.9), ("temi", "recipe", "paper", 0.6),
            ("temi", "beta", "0.5", 0.5), ("temi", "beta", "1.0", 0.7),
            ("kmeans-none", "num_clusters", "10", 0.8), ("kmeans-none", "num_clusters", "20", 0.1),
            ("kmeans-l2", "num_clusters", "10", 0.75)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "setting", "value", "acc"]).assign(seed=0)
    table["settings"] = json.dumps({"beta": 0.6, "num_clusters": 10})
    recipe, beta = plots.sweeps(table).axes
    assert [text.get_text() for text in beta.get_xticklabels()] == ["0.5", "0.6", "1.0"]
    assert [text.get_text() for text in recipe.get_xticklabels()] == ["fast", "paper"]
    means, _, ring, kmeans = beta.lines
    assert means.get_ydata().tolist() == [0.5, 0.9, 0.7]
    assert (ring.get_xdata().item(), ring.get_ydata().item()) == (1, 0.9)
    assert kmeans.get_ydata().tolist() == [0.8, 0.8, 0.8]


def test_scores_of_the_digits_that_are_there_stay(tmp_path, monkeypatch, capsys):
    digits = ablations.temi.load_images("digits")
    features = ablations.temi.embed(digits, "pixels", data_dir=tmp_path, progress=False)
    monkeypatch.setattr(digits_scores.temi, "embed", lambda *_: features)
    monkeypatch.setattr(digits_scores, "TABLE", tmp_path / "scores.csv")
    monkeypatch.setattr(digits_scores, "FIGURE", tmp_path / "scores.csv")
    config = ablations.temi.TrainConfig(num_clusters=10, precision="fp32")
    key = digits_scores.key(features, config)
    pd.DataFrame({"acc": [0.9], "made_from": [key]}).to_csv(tmp_path / "scores.csv")
    digits_scores.main()
    assert "is there already" in capsys.readouterr().out

    def train(*_):
        raise InterruptedError

    monkeypatch.setattr(digits_scores.temi, "train", train)
    monkeypatch.setitem(ablations.CODE, "temi", ablations.CODE["kmeans"])
    with pytest.raises(InterruptedError):
        digits_scores.main()


def test_values_of_a_sweep_are_in_order_and_backbones_left_out():
    rows = [("temi", "recipe", "fast", 0.9, 0), ("temi", "recipe", "fast", 0.7, 1),
            ("temi", "num_clusters", "5", 0.4, 0), ("temi", "num_clusters", "5", 0.2, 1),
            ("temi", "num_clusters", "100", 0.5, 0), ("temi", "backbone", "pixels", 0.3, 0),
            ("kmeans", "num_clusters", "10", 0.8, 0), ("kmeans", "num_clusters", "10", 0.6, 1),
            ("kmeans", "num_clusters", "100", 0.2, 0)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "setting", "value", "acc", "seed"])
    table["settings"] = json.dumps({"num_clusters": 10, "backbone": "pixels"})
    _, clusters = plots.sweeps(table).axes
    assert [text.get_text() for text in clusters.get_xticklabels()] == ["5", "10", "100"]
    assert clusters.lines[0].get_ydata() == pytest.approx([0.3, 0.8, 0.5])
    assert clusters.lines[1].get_ydata().size == 5
    kmeans = clusters.lines[3].get_ydata()  # with as many clusters, where that was tried
    assert kmeans == pytest.approx([float("nan"), 0.7, 0.2], nan_ok=True)
