import dataclasses
import json
import shutil
from importlib.resources import files
from unittest.mock import Mock

import jsonschema
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import make_blobs
from sklearn.neighbors import NearestNeighbors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import TWO_EPOCHS

from temi import checkpoints, training
from temi.checkpoints import BEST, LATEST
from temi.config import TrainConfig
from temi.data import ImageSet, load_images
from temi.devices import runs_bf16
from temi.embeddings import Features
from temi.neighbors import check_neighbors
from temi.overview import list_runs
from temi.results import final_results
from temi.rundirs import differences, lock_of, part_of
from temi.runs import load_run
from temi.steps import training_step
from temi.training import train

X, CLASSES = make_blobs(240, 8, centers=4, random_state=0)
FEATURES = dataclasses.replace(
    Features.from_array(X), labels=CLASSES.astype(np.int64), class_names=("a", "b", "c", "d")
)
IMAGES = ImageSet("blobs", np.zeros((240, 4, 4), np.uint8), FEATURES.ids)
SMALL = TrainConfig(num_heads=3, epochs=5, batch_size=60, num_neighbors=5)
SCHEMA = json.loads((files("temi") / "final_results.schema.json").read_text())


def start(run_dir, config=SMALL, features=FEATURES, **options):
    return train(features, config, run_dir=run_dir, progress=False, **options)


def results(run_dir) -> dict:
    """What final_results.json holds, after holding it against the schema."""
    content = json.loads((run_dir / "final_results.json").read_text(), parse_constant=pytest.fail)
    jsonschema.validate(content, SCHEMA)
    return content


def cut_short(run_dir, monkeypatch, epochs=3, **options):
    """A run that ends, by an exception, after so many epochs."""
    steps = []

    def failing(*arguments):
        steps.append(1)
        if len(steps) > 4 * epochs:
            raise RuntimeError("planted")
        return training_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("temi.state.training_step", failing)
        with pytest.raises(RuntimeError, match="planted"):
            start(run_dir, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    return start(run_dir, images=IMAGES, log_every=2), run_dir


def test_results_fit_the_schema(finished, monkeypatch, tmp_path):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert results(finished[1])["metrics"]["acc"] == 1
    unlabelled = Features.from_array(X)
    config = dataclasses.replace(SMALL, num_clusters=4, learning_rate=10.0)
    start(tmp_path / "run", config, unlabelled, on_divergence="retry")
    retried = results(tmp_path / "run")
    assert retried["retries"]
    assert retried["provenance"]["command"] is None  # an array, that no file is known of
    cut_short(tmp_path / "cut", monkeypatch)
    unfinished = results(tmp_path / "cut")
    assert not unfinished["finished"]
    assert len(unfinished["history"]) == 3
    assert unfinished["metrics"]["acc"] is None
    assert len(load_run(tmp_path / "cut").predict(X)) == 240
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(unfinished | {"history": []}, SCHEMA)


@pytest.mark.parametrize("own", [True, False])
def test_the_precision_that_auto_came_to_is_recorded(own, monkeypatch, tmp_path):
    if own and not runs_bf16("cpu"):
        pytest.skip("bfloat16 products stop the process here")
    monkeypatch.setattr("temi.devices.has_bf16", lambda _: own)
    start(tmp_path / "run")
    assert results(tmp_path / "run")["provenance"]["precision"] == ("bf16" if own else "fp32")


def test_tensorboard(finished):
    run, run_dir = finished
    events = EventAccumulator(str(run_dir / "logs"), {"images": 0, "scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    epoch = {"marginal_entropy", "gradient_norm", "learning_rate", "ensemble_acc"}
    wanted = {"loss/head 00", "loss/head 02", "step/loss"} | {f"epoch/{name}" for name in epoch}
    assert wanted <= set(tags["scalars"])
    losses = [event.value for event in events.Scalars("loss/head 01")]
    np.testing.assert_allclose(losses, [e["head_losses"][1] for e in run.history], rtol=1e-6)
    assert [event.step for event in events.Scalars("step/loss")] == list(range(1, 20, 2))
    assert tags["histograms"] == ["cluster sizes"]
    assert tags["images"] == ["clusters"]
    assert {"final/acc", "final/loss"} <= set(tags["scalars"])  # with the settings


def test_no_command_repeats_a_run_on_given_neighbors(tmp_path):
    near = NearestNeighbors(n_neighbors=6).fit(X).kneighbors(X, return_distance=False)[:, 1:]
    features = dataclasses.replace(FEATURES, manifest=FEATURES.manifest | {"dataset": "x.npy"})
    start(tmp_path / "run", features=features)
    searched = results(tmp_path / "run")["provenance"]
    assert searched["command"].startswith("python -m temi train x.npy")
    assert searched["neighbors"] is None
    for again in ({}, {"resume": "auto"}):  # the second time nothing is left to do
        start(tmp_path / "given", features=features, neighbors=near, **again)
        given = results(tmp_path / "given")["provenance"]
        assert given["neighbors"] == check_neighbors(near, 240)
        assert given["command"] is None


@pytest.mark.parametrize(
    ("dataset", "found"), [("mine", None), ("/nowhere/train+test", None), ("digits", "digits")]
)
def test_a_command_is_of_images_that_it_finds(dataset, found, tmp_path):
    manifest = FEATURES.manifest | {"dataset": dataset, "backbone": "pixels"}
    start(tmp_path / "run", features=dataclasses.replace(FEATURES, manifest=manifest))
    command = results(tmp_path / "run")["provenance"]["command"]
    assert (command or "python -m temi train None").split()[4] == str(found)


def test_the_command_of_both_splits_of_a_folder(tmp_path):
    manifest = FEATURES.manifest | {"dataset": f"{tmp_path}/train+test", "backbone": "pixels"}
    start(tmp_path / "run", features=dataclasses.replace(FEATURES, manifest=manifest))
    command = results(tmp_path / "run")["provenance"]["command"]
    assert command.startswith(f"python -m temi train {tmp_path} --backbone pixels")
    assert "--split both" in command


def test_names_of_the_checkpoints(tmp_path):
    run = start(tmp_path / "run", checkpoint_every=2)
    held = {
        path.name: checkpoints.load(path)["epoch"]
        for path in (tmp_path / "run" / "checkpoints").iterdir()
    }
    best = 1 + int(np.argmin([min(entry["head_losses"]) for entry in run.history]))
    assert held == {
        LATEST: 5, "checkpoint_previous.pth": 4, BEST: best,
        "checkpoint_epoch_0002.pth": 2, "checkpoint_epoch_0004.pth": 4,
    }  # fmt: skip


@pytest.fixture
def fourth_is_best(monkeypatch):
    """Checkpoints written, by name and epoch, of runs whose fourth epoch is the best."""
    save, written = checkpoints.save, []

    def counted(path, content, position):
        written.append((path.name, position.epoch))
        save(path, content, position)

    monkeypatch.setattr(checkpoints, "save", counted)
    monkeypatch.setattr("temi.records.best_epoch", lambda past, _: (min(4, len(past)), 0.0))
    return written


def test_short_epochs_share_a_checkpoint(fourth_is_best, tmp_path):
    config = dataclasses.replace(SMALL, epochs=12)
    start(tmp_path / "run", config)
    assert fourth_is_best == [(LATEST, 1), (BEST, 4), (LATEST, 10), (LATEST, 12)]
    start(tmp_path / "all", config, checkpoint_every=1, keep_checkpoints=12)
    best = checkpoints.load(tmp_path / "run" / "checkpoints" / BEST)
    fourth = checkpoints.load(tmp_path / "all" / "checkpoints" / "checkpoint_epoch_0004.pth")
    assert len(best["history"]) == 4
    for name, weight in fourth["teacher"].items():
        assert (best["teacher"][name] == weight).all()


def test_long_epochs_have_a_checkpoint_each(fourth_is_best, monkeypatch, tmp_path):
    monkeypatch.setattr("temi.records.SAVE_SECONDS", 0.0)
    start(tmp_path / "run")
    assert fourth_is_best == [(LATEST, epoch) for epoch in range(1, 6)]
    assert checkpoints.load(tmp_path / "run" / "checkpoints" / BEST)["epoch"] == 4


def test_a_training_that_is_cut_short_keeps_the_best(fourth_is_best, monkeypatch, tmp_path):
    cut_short(tmp_path / "run", monkeypatch, epochs=5, config=dataclasses.replace(SMALL, epochs=9))
    assert fourth_is_best == [(LATEST, 1), (BEST, 4), ("checkpoint_emergency.pth", 5)]


def test_best_by_accuracy_is_an_oracle(tmp_path):
    run = start(tmp_path / "run", best_by="accuracy")
    accuracies = [entry["ensemble_acc"] for entry in run.history]
    best = {"chosen_by": "accuracy", "labels_used": True, "value": max(accuracies),
            "epoch": 1 + accuracies.index(max(accuracies))}  # fmt: skip
    assert results(tmp_path / "run")["best_checkpoint"] == best
    saved = checkpoints.load(tmp_path / "run" / "checkpoints" / BEST)
    assert saved["epoch"] == best["epoch"]
    with pytest.raises(ValueError, match="best_by='accuracy': these embeddings have no labels"):
        train(X, dataclasses.replace(SMALL, num_clusters=4), best_by="accuracy")


@pytest.mark.parametrize("options", [{}, {"resume": "auto"}])
def test_a_run_that_another_process_has_begun_meanwhile_stays(options, monkeypatch, tmp_path):
    search = training.search_neighbors

    def meanwhile(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(training, "search_neighbors", search)
            cut_short(tmp_path / "run", monkeypatch)
        return search(*arguments)

    monkeypatch.setattr(training, "search_neighbors", meanwhile)
    with pytest.raises(ValueError, match="another process has begun a run there meanwhile"):
        start(tmp_path / "run", **options)
    assert len(results(tmp_path / "run")["history"]) == 3


@pytest.mark.parametrize("options", [{"resume": "auto"}, {"overwrite": True}])
@pytest.mark.parametrize("finished_before", [False, True])
def test_a_run_that_grows_is_closed_to_others(finished_before, options, monkeypatch, tmp_path):
    run_dir, refused = tmp_path / "run", []
    if finished_before:
        start(run_dir)

    def meanwhile(*arguments):
        if not refused:
            with monkeypatch.context() as patch:
                patch.setattr(training, "search_neighbors", Mock(side_effect=AssertionError))
                with pytest.raises(ValueError, match="another process trains there") as why:
                    start(run_dir, **options)  # before any work
            refused.append(why)
        return training_step(*arguments)

    monkeypatch.setattr("temi.state.training_step", meanwhile)
    start(run_dir)
    assert refused
    assert len(results(run_dir)["history"]) == 5
    start(run_dir, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_killed_process_left_of_its_lock_closes_nothing(monkeypatch, tmp_path):
    lock_of(tmp_path / "run").touch()
    cut_short(tmp_path / "run", monkeypatch)
    start(tmp_path / "run", resume="auto")


def test_a_run_that_could_not_begin_leaves_no_lock(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("temi.records.write_json", Mock(side_effect=OSError("planted")))
        with pytest.raises(OSError, match="planted") as why:
            start(tmp_path / "run")
    assert why.tb  # whose frames keep the record alive, as a notebook's last error does
    start(tmp_path / "run")


def test_a_run_that_was_killed_before_it_had_a_folder_of_checkpoints_starts_anew(tmp_path):
    run_dir = tmp_path / "run"
    start(run_dir)
    for path in (*run_dir.glob("checkpoints/*"), run_dir / "checkpoints", run_dir / "clusters.png"):
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    (run_dir / "final_results.json").unlink()
    start(run_dir, resume="auto")
    assert results(run_dir)["finished"]


def test_a_run_from_an_earlier_checkpoint_knows_none_of_the_later_ones(tmp_path):
    start(tmp_path / "a", dataclasses.replace(SMALL, epochs=6), checkpoint_every=2)
    early = tmp_path / "a" / "checkpoints" / "checkpoint_epoch_0002.pth"
    run = start(tmp_path / "b", dataclasses.replace(SMALL, epochs=4), resume=early)
    again = load_run(tmp_path / "b")
    assert len(again.history) == len(run.history) == 4
    np.testing.assert_array_equal(again.labels, run.labels)
    more = start(tmp_path / "b", dataclasses.replace(SMALL, epochs=5), resume="auto")
    assert len(more.history) == 5


@pytest.mark.parametrize("beta", [0.6, 0.7])
def test_another_runs_checkpoint_replaces_neither_an_unfinished_run_nor_one_of_others(
    beta, monkeypatch, tmp_path
):
    start(tmp_path / "a")
    source = tmp_path / "a" / "checkpoints" / LATEST
    if beta == 0.6:
        cut_short(tmp_path / "b", monkeypatch)
    else:
        start(tmp_path / "b", dataclasses.replace(SMALL, beta=beta))
    before = results(tmp_path / "b")
    with pytest.raises(ValueError, match=r"holds (an unfinished run|a run with beta=0\.7)"):
        start(tmp_path / "b", dataclasses.replace(SMALL, epochs=6), resume=source)
    assert results(tmp_path / "b") == before


def test_a_checkpoint_that_cannot_be_written_is_an_error(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_latest", full)
    with pytest.raises(OSError, match="No space left"):
        start(tmp_path / "run")


def test_a_damaged_record_is_named_and_can_be_overwritten(tmp_path):
    start(tmp_path / "run")
    start(tmp_path / "other")
    (tmp_path / "run" / "final_results.json").write_text("{")
    with pytest.warns(UserWarning, match=r"left out: .*final_results\.json: damaged"):
        assert list(list_runs(tmp_path).index) == ["other"]
    (tmp_path / "run" / "final_results.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"left out: .*final_results\.json: no record of a run"):
        assert list(list_runs(tmp_path).index) == ["other"]
    (tmp_path / "run" / "final_results.json").write_text("")
    with pytest.raises(ValueError, match="holds an unfinished run"):
        start(tmp_path / "run")
    start(tmp_path / "run", overwrite=True)
    (tmp_path / "run" / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config\.json: damaged, no whole JSON file"):
        start(tmp_path / "run", resume="auto")


def test_what_a_kill_left_of_a_first_file_does_not_block_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.part").touch()
    start(tmp_path / "run")
    assert results(tmp_path / "run")["finished"]
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "holiday.mp4.part").touch()
    with pytest.raises(ValueError, match="holds files but no run"):
        start(tmp_path / "films")
    assert (tmp_path / "films" / "holiday.mp4.part").exists()


def test_another_device_may_go_on():
    assert differences({"device": "cpu", "beta": 0.6}, {"device": "cuda", "beta": 0.6}) == []
    assert differences({"beta": 0.6}, {"beta": 0.7}) == ["beta=0.6 (now 0.7)"]


def test_the_picture_is_of_the_images_that_could_be_read(monkeypatch, tmp_path):
    drawn = []

    def rows(images, labels, agreement):
        drawn.append((images.shape, len(labels), len(agreement)))
        return Figure()

    monkeypatch.setattr("temi.plots.cluster_rows", rows)
    some = dataclasses.replace(FEATURES, x=X[5:], ids=FEATURES.ids[5:], labels=CLASSES[5:])
    start(tmp_path / "run", features=some, images=IMAGES)
    assert drawn == [((235, 4, 4), 235, 235)]


def test_images_that_are_gone_at_the_end_cost_the_picture_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    for row in range(len(X)):
        Image.new("L", (4, 4), row).save(tmp_path / "photos" / f"{row:03d}.png")
    images = load_images(str(tmp_path / "photos"))
    features = dataclasses.replace(Features.from_array(X), ids=images.ids)
    config = dataclasses.replace(SMALL, num_clusters=4)
    with pytest.raises(ValueError, match=r"lies among the images, and its clusters\.png would be"):
        start(tmp_path / "photos" / "run", config, features, images=images)
    assert not (tmp_path / "photos" / "run").exists()
    start(tmp_path / "photos" / ".temi" / "run", config, features, images=images)  # never listed
    shutil.rmtree(tmp_path / "photos")
    with pytest.warns(UserWarning, match=r"clusters\.png is left out"):
        start(tmp_path / "run", config, features, images=images)
    assert results(tmp_path / "run")["finished"]
    assert (tmp_path / "run" / "assignments.csv").exists()


@pytest.mark.parametrize("finished_before", [False, True])
def test_an_unfinished_run_is_never_overwritten(finished_before, monkeypatch, tmp_path):
    run_dir = tmp_path / "run"
    if finished_before:
        start(run_dir)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    cut_short(run_dir, monkeypatch)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert part_of(run_dir).exists() == finished_before
    ways = "unfinished run; give resume='auto' .*, overwrite=True .*, or another run_dir"
    with pytest.raises(ValueError, match=ways):
        start(run_dir)
    with pytest.raises(ValueError, match=r"beta=0\.6 \(now 0\.7\); give overwrite=True"):
        start(run_dir, dataclasses.replace(SMALL, beta=0.7), resume="auto")
    start(run_dir, overwrite=True)
    assert results(run_dir)["finished"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(beta=0.7), r"beta=0\.6 \(now 0\.7\)"),
        (dict(num_heads=4), r"num_heads=3 \(now 4\)"),
        (dict(num_clusters=5), r"num_clusters=4 \(now 5\)"),
        (dict(learning_rate=0.1, batch_size=40), r"learning_rate=0.004 .*, batch_size=60"),
        (dict(loss="pmi"), r"loss='temi' \(now 'pmi'\)"),
        (dict(schedule="cosine", epochs=6), r"epochs=5 \(now 6\), schedule='constant'"),
        (dict(epochs=3), "epochs=3: the checkpoint has 5 behind it"),
        (dict(seed=1), r"seed=0 \(now 1\)"),
    ],
)
def test_other_settings_are_refused_by_name(change, message, finished, tmp_path):
    path = finished[1] / "checkpoints" / LATEST
    config = dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match=message) as error:
        start(tmp_path / "other", config, resume=path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_other_data_is_refused(finished, tmp_path):
    path = finished[1] / "checkpoints" / LATEST
    with pytest.raises(ValueError, match="other embeddings"):
        start(tmp_path / "other", features=dataclasses.replace(FEATURES, x=X + 1), resume=path)
    with pytest.raises(ValueError, match=r"resume='gone\.pth': there is no such checkpoint"):
        start(tmp_path / "other", resume="gone.pth")
    with pytest.raises(ValueError, match="resume='auto': looks in run_dir; give it"):
        start(None, resume="auto")


def test_a_finished_run_goes_on_where_it_stands(finished, tmp_path):
    run = start(tmp_path / "run")
    again = start(tmp_path / "run", resume="auto")  # nothing is left to do
    np.testing.assert_array_equal(again.labels, run.labels)
    more = start(tmp_path / "run", dataclasses.replace(SMALL, epochs=7), resume="auto")
    assert [entry["epoch"] for entry in more.history] == list(range(1, 8))
    assert results(tmp_path / "run")["config"]["epochs"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    logs = EventAccumulator(str(tmp_path / "run" / "logs"), {"scalars": 0})
    logs.Reload()
    steps = sorted(event.step for event in logs.Scalars("loss/head 00"))  # files of one second
    assert steps == list(range(1, 8))  # have no order


def test_a_damaged_checkpoint_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setattr("temi.records.SAVE_SECONDS", 0.0)
    cut_short(tmp_path / "run", monkeypatch)
    folder = tmp_path / "run" / "checkpoints"
    for name in ("checkpoint_emergency.pth", LATEST):
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"cut short; going on from checkpoint_previous\.pth"):
        run = start(tmp_path / "run", resume="auto")
    np.testing.assert_array_equal(run.labels, start(None).labels)


def test_a_swap_that_was_cut_short_is_completed(tmp_path):
    """Killed between the two renames: the successor is there, the old one is aside."""
    start(tmp_path / "run")
    start(tmp_path / "next", dataclasses.replace(SMALL, seed=1))
    (tmp_path / "run").rename(tmp_path / ".run.old")
    (tmp_path / "next").rename(part_of(tmp_path / "run"))
    run = start(tmp_path / "run", dataclasses.replace(SMALL, seed=1), resume="auto")
    table = pd.read_csv(tmp_path / "run" / "assignments.csv")
    np.testing.assert_array_equal(table["cluster"], run.labels)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_k_means_is_of_the_seed_of_the_run(monkeypatch):
    seeds = []

    def kmeans(x, clusters, how, seed=0):
        seeds.append((how, seed))
        return CLASSES

    monkeypatch.setattr("temi.results.kmeans", kmeans)
    features = dataclasses.replace(
        Features.from_array(X), labels=CLASSES, class_names=tuple("abcd")
    )
    run = train(features, dataclasses.replace(TWO_EPOCHS, seed=3), progress=False)
    final_results(run, features)
    assert seeds == [("none", 3), ("center-l2", 3)]


def test_a_table_of_many_rows_has_one_header(tmp_path, monkeypatch):
    monkeypatch.setattr("temi.records.ROWS", 100)
    run = train(X, TWO_EPOCHS, run_dir=tmp_path / "run", progress=False)
    table = pd.read_csv(tmp_path / "run" / "assignments.csv")
    assert table["path"].tolist() == list(range(240))
    np.testing.assert_array_equal(table["cluster"], run.labels)


def test_what_the_record_says_of_heads_and_clusters():
    config = dataclasses.replace(TWO_EPOCHS, epochs=1, num_clusters=8)
    run = train(X, config, progress=False)
    features = dataclasses.replace(Features.from_array(X), manifest={
        "dataset": "x.npy", "backbone": "own", "sha256": ""})  # fmt: skip
    retried = dataclasses.replace(run, retries=[{"epoch": 1}])
    for each, words in ((run, False), (retried, True)):
        said = final_results(each, features)
        assert ("--on-divergence retry" in said["provenance"]["command"]) == words
    votes = (run.head_labels == run.labels).mean()
    assert said["ensemble"]["mean_agreement"] == pytest.approx(votes)


def test_a_finished_run_stays_beside_an_unfinished_successor(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    start(run_dir)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    cut_short(run_dir, monkeypatch)
    for options in ({}, {"config": dataclasses.replace(SMALL, beta=0.7), "resume": "auto"}):
        with pytest.raises(ValueError, match="give"):
            start(run_dir, **options)
        assert part_of(run_dir).exists()
        assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    assert results(run_dir)["finished"]
