import dataclasses
import json
import shlex
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic_settings import CliApp, get_subcommand

from temi import checkpoints
from temi.__main__ import App
from temi.cache import embed
from temi.config import TrainConfig
from temi.data import load_images
from temi.embeddings import Features
from temi.export import assignments, sort_images
from temi.metrics import SCORES, evaluate
from temi.overview import list_runs, summary
from temi.parameters import JobConfig
from temi.plots import compare_runs
from temi.rundirs import default_run_dir, plan_run
from temi.runs import load_run
from temi.training import train

QUICK = TrainConfig(num_heads=2, epochs=2, num_neighbors=5, mutual_neighbors=True)


@pytest.fixture(scope="module")
def images():
    return load_images("digits")


@pytest.fixture(scope="module")
def features(images):
    return embed(images)


@pytest.fixture(scope="module")
def finished(images, features, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "digits-pixels"
    return train(features, QUICK, images=images, run_dir=run_dir, progress=False), run_dir


def test_the_command_in_the_record_has_the_settings_of_the_run(finished):
    run, run_dir = finished
    recorded = json.loads((run_dir / "final_results.json").read_text())["provenance"]["command"]
    *program, name = shlex.split(recorded)[:4]
    assert (program, name) == (["python", "-m", "temi"], "train")
    command = get_subcommand(CliApp.run(App, cli_args=shlex.split(recorded)[3:]))
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    given = TrainConfig(**{name: getattr(command, name) for name in names})
    assert given.resolve(1797, 10) == run.config
    assert (command.dataset, command.backbone) == ("digits", "pixels")


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (
            {"dataset": "stl10-test", "image_size": 48},
            "stl10 --backbone {} --split test --image-size 48",
        ),
        ({"dataset": "cifar10", "weights_file": "w.pth"}, "cifar10 --backbone {} --weights w.pth"),
        (
            {"dataset": "photos-both", "image_size": None},
            "photos-both --backbone {} --labels folders",
        ),
        (
            {"dataset": "digits", "spaces": [{"image_size": 6}]},
            "digits --backbone {} --image-size 6",
        ),
    ],
)
def test_the_command_of_what_python_embedded_embeds_it_again(
    manifest, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos-both").mkdir()
    run_dir = tmp_path / "run"
    x = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    manifest = {"backbone": "dinov2_vits14", "sha256": "0"} | manifest
    features = Features(x, [*map(str, range(60))], manifest, np.arange(60) // 20, ("a", "b", "c"))
    train(features, dataclasses.replace(QUICK, epochs=10), run_dir=run_dir, progress=False)
    recorded = json.loads((run_dir / "final_results.json").read_text())["provenance"]["command"]
    assert recorded.startswith(f"python -m temi train {words.format('dinov2_vits14')} --recipe")


def test_files(finished):
    run, run_dir = finished
    names = {"assignments.csv", "checkpoints", "clusters.png", "config.json",
             "final_results.json", "logs"}  # fmt: skip
    assert {path.name for path in run_dir.iterdir()} == names
    assert not [path for path in run_dir.parent.iterdir() if path != run_dir]
    assert json.loads((run_dir / "config.json").read_text()) == {
        "dataset": "digits", "backbone": "pixels", **dataclasses.asdict(run.config)
    }  # fmt: skip


def test_results(finished, images):
    run, run_dir = finished
    results = json.loads((run_dir / "final_results.json").read_text())
    assert results["metrics"] == evaluate(run.labels, images.labels)
    assert results["best_head"]["loss"] == min(head["loss"] for head in results["per_head"])
    assert results["mean_head"]["acc"] == pytest.approx(
        np.mean([evaluate(labels, images.labels)["acc"] for labels in run.head_labels])
    )
    assert set(results["kmeans"]) == {"none", "center-l2"}
    assert 0.7 < results["kmeans"]["none"]["acc"] < 0.85
    assert sum(results["cluster_statistics"]["sizes"]) == 1797
    assert len(results["history"]) == 2
    assert results["history"][-1]["ensemble_acc"] == pytest.approx(results["metrics"]["acc"])
    assert results["config"]["num_clusters"] == 10
    assert "train digits --backbone pixels" in results["provenance"]["command"]
    assert "--num-heads 2" in results["provenance"]["command"]
    assert results["finished"]
    losses = [min(entry["head_losses"]) for entry in results["history"]]
    best = {"chosen_by": "loss", "labels_used": False, "epoch": 2, "value": min(losses)}
    assert results["best_checkpoint"] == best


def test_assignments(finished, images, tmp_path):
    run, run_dir = finished
    table = pd.read_csv(run_dir / "assignments.csv")
    assert table["path"].tolist() == list(images.ids)
    sort_images(table[:20], images, tmp_path / "sorted")  # has what that needs
    np.testing.assert_array_equal(table["cluster"], run.labels)
    np.testing.assert_allclose(table["agreement"], run.agreement)


def test_without_labels_there_are_no_scores(images, features, tmp_path):
    unlabelled = dataclasses.replace(features, labels=None, class_names=())
    config = dataclasses.replace(QUICK, num_clusters=10)
    train(unlabelled, config, images=images, run_dir=tmp_path / "run", progress=False)
    results = json.loads((tmp_path / "run" / "final_results.json").read_text())
    assert results["metrics"] == dict.fromkeys(("acc", "nmi", "anmi", "ari"))
    assert results["mean_head"]["acc"] is None
    assert results["mean_head"]["loss"] is not None
    assert "ensemble_acc" not in results["history"][0]


def test_labels_change_nothing_but_scores(finished, images, features):
    run, _ = finished
    config = dataclasses.replace(QUICK, num_clusters=10)
    unlabelled = dataclasses.replace(features, labels=None, class_names=())
    np.testing.assert_array_equal(train(unlabelled, config, progress=False).labels, run.labels)


def test_a_run_of_other_settings_is_never_overwritten(images, features, tmp_path):
    run_dir = tmp_path / "run"
    train(features, QUICK, images=images, run_dir=run_dir, progress=False)
    before = (run_dir / "final_results.json").read_text()
    other = dataclasses.replace(QUICK, beta=0.7)
    ways = "overwrite=True .*, another run_dir, .*resume='auto'"
    with pytest.raises(ValueError, match=rf"holds a run with beta=0\.6 \(now 0\.7\); give {ways}"):
        train(features, other, images=images, run_dir=run_dir, progress=False)
    assert (run_dir / "final_results.json").read_text() == before
    train(features, other, images=images, run_dir=run_dir, overwrite=True, progress=False)
    assert json.loads((run_dir / "config.json").read_text())["beta"] == 0.7


def test_a_finished_run_stays_until_its_successor_is_done(finished, images, features, monkeypatch):
    _, run_dir = finished
    before = (run_dir / "final_results.json").read_text()
    monkeypatch.setattr("temi.plots.cluster_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(features, QUICK, images=images, run_dir=run_dir, progress=False)
    assert (run_dir / "final_results.json").read_text() == before
    monkeypatch.undo()
    ways = "give resume='auto' .*, overwrite=True .*, or another run_dir"
    with pytest.raises(ValueError, match=f"holds an unfinished run; {ways}"):
        train(features, QUICK, images=images, run_dir=run_dir, progress=False)
    train(features, QUICK, images=images, run_dir=run_dir, resume="auto", progress=False)
    assert (run_dir / "final_results.json").read_text() != before  # the seconds differ
    assert [path.name for path in run_dir.parent.iterdir()] == [run_dir.name]


def test_a_folder_of_other_files_is_never_touched(images, features, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds files but no run"):
        train(features, QUICK, images=images, run_dir=tmp_path, overwrite=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("TEMI_HOME", str(tmp_path))
    names = {
        "digits-pixels": TrainConfig(),
        "digits-pixels-beta0.7": TrainConfig(beta=0.7, device="cpu"),
        "digits-pixels-paper-num_heads4-seed1": TrainConfig(recipe="paper", num_heads=4, seed=1),
        "digits-pixels-num_clusters20": TrainConfig(num_clusters=20),
    }
    for name, config in names.items():
        assert default_run_dir("digits", "pixels", config) == tmp_path / "runs" / name
    many = dict(learning_rate=0.0031, weight_decay=0.00011, teacher_momentum=0.91, beta=0.71)
    many |= dict(teacher_temp=0.091, student_temp=0.091, clip_grad=2.5, normalize="l2", seed=5)
    one, other = (
        default_run_dir("digits", "pixels", TrainConfig(**many, pca_dim=dim)).name
        for dim in (11, 12)
    )
    assert one.startswith("digits-pixels-beta0.71-")
    assert one != other
    assert len(one) == len(other) == 150  # with what stands beside it, a file system takes 255


def test_plan(images, monkeypatch, tmp_path):
    monkeypatch.setenv("TEMI_HOME", str(tmp_path))
    config, run_dir = plan_run(JobConfig(run_dir="mine/a"), TrainConfig(), images)
    assert config.num_clusters == 10
    assert run_dir == tmp_path / "mine" / "a"
    with pytest.raises(ValueError, match="batch_size=4000"):
        plan_run(JobConfig(), TrainConfig(batch_size=4000), images)
    sizes = [plan_run(JobConfig(image_size=size), TrainConfig(), images)[1] for size in (4, None)]
    assert sizes[0] != sizes[1]


def test_a_finished_run_of_other_sources_is_not_replaced_unasked(images, tmp_path):
    job = JobConfig(run_dir=str(tmp_path / "run"), data_dir=str(tmp_path))
    config, run_dir = plan_run(job, QUICK, images)
    train(job.embed(images, config), config, run_dir=run_dir, progress=False)
    smaller = dataclasses.replace(job, image_size=4)
    plan_run(dataclasses.replace(job, labels="folders"), QUICK, images)  # which score, no more
    with pytest.raises(ValueError, match=r"holds a run with image_size=None \(now 4\); give overw"):
        plan_run(smaller, QUICK, images)
    smaller = dataclasses.replace(smaller, overwrite=True, data_dir=str(tmp_path / "b"))
    plan_run(smaller, QUICK, images)
    train(smaller.embed(images, config), config, run_dir=run_dir, overwrite=True, progress=False)
    with pytest.raises(ValueError, match=r"holds a run with image_size=4 \(now None\); give overw"):
        plan_run(job, QUICK, images)


def test_a_finished_run_of_other_data_is_not_replaced_unasked(tmp_path):
    x = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    x += np.random.default_rng(0).normal(0, 0.1, x.shape)
    near = (np.arange(60)[:, None] + [1, 2, 3, 4, 5]) % 60
    config = dataclasses.replace(QUICK, num_clusters=3, epochs=10)
    for other, what in ((x + 1, "embeddings"), (x, "neighbours")):
        given = {"neighbors": near} if what == "neighbours" else {}
        run = train(x, config, run_dir=tmp_path, progress=False, overwrite=True)
        with pytest.raises(ValueError, match=f"holds a run with other {what}; give overwrite"):
            train(other, config, run_dir=tmp_path, progress=False, **given)
        assert (load_run(tmp_path).labels == run.labels).all()
        train(other, config, run_dir=tmp_path, progress=False, overwrite=True, **given)
        train(other, config, run_dir=tmp_path, progress=False, **given)  # the same once more
    np.save(tmp_path.with_suffix(".npy"), x)
    job = JobConfig(dataset=str(tmp_path.with_suffix(".npy")), run_dir=str(tmp_path))
    train(job.load(), config, run_dir=tmp_path, progress=False, overwrite=True)
    plan_run(job, config, job.load())
    np.save(job.dataset, x + 1)
    with pytest.raises(ValueError, match="holds a run with other embeddings"):
        plan_run(job, config, job.load())


def test_a_run_that_cannot_be_kept_is_refused_before_any_work(images, tmp_path):
    (tmp_path / "file").touch()
    job = JobConfig(run_dir=str(tmp_path / "file" / "run"), data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"run_dir='.*file': nothing can be written there"):
        plan_run(job, QUICK, images)


def test_a_run_whose_images_python_embedded_may_be_repeated(images, tmp_path):
    job = JobConfig(run_dir=str(tmp_path / "run"), data_dir=str(tmp_path))
    config, run_dir = plan_run(job, QUICK, images)
    features = embed(images, "pixels", data_dir=tmp_path)  # without the job in its manifest
    train(features, config, run_dir=run_dir, progress=False)
    assert plan_run(job, QUICK, images) == (config, run_dir)


def test_summary(finished):
    _, run_dir = finished
    text = summary(run_dir)
    for part in ("acc", "nmi", "anmi", "ari", "k-means", "final_results.json", "clusters.png"):
        assert part in text


def test_k_means_that_would_take_too_long_is_left_out_until_asked_for(
    finished, features, tmp_path, monkeypatch, capsys
):
    def scored(**options) -> dict:
        train(features, QUICK, run_dir=tmp_path / "run", progress=False, **options)
        return json.loads((tmp_path / "run" / "final_results.json").read_text())

    size = 1797 * 10 * 64
    monkeypatch.setattr("temi.results.AFFORDABLE", size - 1)
    monkeypatch.setattr("temi.results.NOTICED", size)
    left_out = scored()["kmeans"]
    assert left_out == dict.fromkeys(("none", "center-l2"), dict.fromkeys(SCORES))
    said = capsys.readouterr().out
    assert "1797 images x 10 clusters x 64 dimensions are more than 1150079; baseline=" in said
    assert "scoring: 100%" in said
    assert "3/3" in said  # two heads and their vote
    assert "k-means" not in summary(tmp_path / "run")
    asked_for = scored(resume="auto", baseline="always")  # nothing is left to train
    there = json.loads((finished[1] / "final_results.json").read_text())
    assert asked_for["kmeans"] == there["kmeans"]
    assert "5/5" in capsys.readouterr().out
    assert scored(resume="auto", baseline="never")["kmeans"] == left_out
    assert "k-means" not in capsys.readouterr().out
    monkeypatch.setattr("temi.results.AFFORDABLE", size)
    monkeypatch.setattr("temi.results.NOTICED", size + 1)
    assert scored(resume="auto")["kmeans"] == there["kmeans"]
    assert capsys.readouterr().out == ""


def test_summary_without_labels(tmp_path):
    x = np.repeat(np.eye(4, 6, dtype=np.float32), 50, axis=0)
    noise = np.random.default_rng(0).normal(0, 0.1, x.shape).astype(np.float32)
    config = TrainConfig(num_clusters=4, num_heads=2, epochs=4)
    run = train(x + noise, config, run_dir=tmp_path / "run", progress=False)
    head, numbers = summary(tmp_path / "run").splitlines()[:2]
    assert head.split()[:5] == ["images", "clusters", "empty", "smallest", "largest"]
    sizes = np.bincount(run.labels, minlength=4)
    told = [200, 4, (sizes == 0).sum(), sizes.min(), sizes.max(), run.agreement.mean()]
    assert [float(number) for number in numbers.split()[-6:]] == pytest.approx(told, abs=1e-3)


def test_no_summary_of_an_unfinished_run(finished, tmp_path):
    record = json.loads((finished[1] / "final_results.json").read_text()) | {"finished": False}
    (tmp_path / "final_results.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds no finished run"):
        summary(tmp_path)


def test_a_run_read_back_is_the_run(finished, features):
    run, run_dir = finished
    for path in (run_dir, run_dir / "checkpoints" / checkpoints.LATEST):
        again = load_run(path)
        assert again.config == run.config
        assert [e["head_losses"] for e in again.history] == [e["head_losses"] for e in run.history]
        np.testing.assert_array_equal(again.labels, run.labels)
        np.testing.assert_array_equal(again.agreement, run.agreement)
        np.testing.assert_array_equal(again.predict(features), run.labels)
        np.testing.assert_array_equal(again.predict_proba(features), run.predict_proba(features))
    with pytest.raises(ValueError, match="there is no such run directory or checkpoint"):
        load_run(run_dir / "gone")


def test_list_of_runs(features, tmp_path):
    for name, config in {"a": QUICK, "b": dataclasses.replace(QUICK, beta=0.7)}.items():
        train(features, config, run_dir=tmp_path / name, progress=False)
    table = list_runs(tmp_path)
    assert table.index.tolist() == ["a", "b"]
    settings = ["dataset", "backbone", "beta"]
    results = ["acc", "nmi", "anmi", "ari", "epochs_done", "seconds", "finished"]
    assert table.columns.tolist() == settings + results
    assert table["beta"].tolist() == [0.6, 0.7]
    assert table["acc"].between(0.3, 1).all()
    assert list_runs(tmp_path / "a").empty
    figure = compare_runs([load_run(tmp_path / name) for name in "ab"], ["a", "b"])
    assert [len(axis.lines) for axis in figure.axes] == [2, 2]


def test_a_bf16_run_is_read_back_where_there_is_no_bf16(finished, monkeypatch):
    run, run_dir = finished
    settings = dataclasses.replace(run.config, precision="bf16")  # tried once, and kept
    for name in ("has_bf16", "runs_bf16"):
        monkeypatch.setattr(f"temi.devices.{name}", lambda kind: False)
    content = checkpoints.load(run_dir / "checkpoints" / checkpoints.LATEST)
    monkeypatch.setattr(
        checkpoints, "newest",
        lambda folder: (None, content | {"config": dataclasses.asdict(settings)}),
    )  # fmt: skip
    assert load_run(run_dir).config == run.config


def test_a_run_that_is_not_whole_is_in_no_list(finished):
    _, run_dir = finished
    hidden = run_dir.with_name(f".{run_dir.name}.part")
    shutil.copytree(run_dir, hidden)
    assert list_runs(run_dir.parent).index.tolist() == [run_dir.name]
    shutil.rmtree(hidden)


def test_summary_of_what_is_no_finished_run(finished, tmp_path, monkeypatch):
    _, run_dir = finished
    monkeypatch.chdir(run_dir.parent)
    assert summary(run_dir.name) == summary(run_dir).replace(f"{run_dir}", run_dir.name)
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match=r"run_dir='.*': holds no finished run"):
            summary(folder)


def test_arrays_and_images_take_their_own_options(finished, features, images):
    run, _ = finished
    with pytest.raises(TypeError, match=r"predict\(\) takes split, device with images alone"):
        run.predict(features, split="test", device="cpu")
    with pytest.raises(ValueError, match="split='test': images that are loaded already take none"):
        run.predict(images, split="test")
    np.testing.assert_array_equal(run.predict(images, progress=False)["cluster"], run.labels)


def test_the_best_by_accuracy_needs_labels_from_the_first_epoch(features, tmp_path):
    place = dict(run_dir=tmp_path / "run", progress=False)
    train(dataclasses.replace(features, labels=None, class_names=()),
          dataclasses.replace(QUICK, num_clusters=10), **place)  # fmt: skip
    longer = dataclasses.replace(QUICK, num_clusters=10, epochs=3)
    with pytest.raises(ValueError, match="best_by='accuracy': the run began without labels"):
        train(features, longer, resume="auto", best_by="accuracy", **place)


def test_checkpoints_of_any_name_are_gone_on_from(finished, features, images):
    _, run_dir = finished
    mine = run_dir / "mine.pth"
    shutil.copy(run_dir / "checkpoints" / checkpoints.LATEST, mine)
    longer = dataclasses.replace(QUICK, epochs=3)
    run = train(features, longer, images=images, run_dir=run_dir, resume=mine, progress=False)
    assert len(run.history) == 3


def test_embeddings_of_other_length_are_refused(finished, features):
    run, _ = finished
    with pytest.raises(ValueError, match="of 5 numbers: the run was trained on 64 an image"):
        run.predict(features.x[:, :5])


def test_soft_consensus_is_the_mean_of_aligned_probabilities(finished, features):
    """Against each head's own softmax, its columns put into the common numbers one by one."""
    run, _ = finished
    with torch.inference_mode():
        probs = (run.teacher(run.inputs(features)) / run.config.teacher_temp).softmax(dim=-1)
    aligned = np.empty(probs.shape, dtype=np.float64)
    for head in range(len(probs)):
        for own in range(probs.shape[-1]):
            aligned[head, :, run.alignment[head, own]] = probs[head, :, own]
    for weights in (None, np.array([3.0, 1.0])):
        mean = np.average(aligned, axis=0, weights=weights)
        labels, confidence = run.soft_consensus(features, weights)
        np.testing.assert_array_equal(labels, mean.argmax(axis=1))
        np.testing.assert_allclose(confidence, mean.max(axis=1), rtol=1e-5)


def test_compare_runs_shows_the_lowest_loss_and_no_accuracy_without_labels():
    history = [{"epoch": e, "head_losses": [-e, -3 * e]} for e in (1, 2)]
    left, right = compare_runs([SimpleNamespace(history=history)], ["a"]).axes
    assert left.lines[0].get_ydata().tolist() == [-3, -6]
    assert np.isnan(right.lines[0].get_ydata()).all()


@pytest.mark.parametrize("best", [0, 1])
def test_of_two_heads_the_one_of_the_lower_loss_breaks_all_ties(finished, features, best):
    run, _ = finished
    judged = dataclasses.replace(run, head_losses=np.eye(2)[1 - best])
    heads = judged.predict_heads(features)
    assert (heads[0] != heads[1]).any()
    np.testing.assert_array_equal(judged.vote(features)[0], heads[best])
    history = [run.history[-1] | {"head_losses": judged.head_losses.tolist()}]
    again = type(run).from_heads(
        run.config, {}, run.teacher, run.mean, run.axes, heads, history, [], {}
    )
    np.testing.assert_array_equal(again.labels, heads[best])
    np.testing.assert_array_equal(again.alignment[best], range(10))


def test_embeddings_of_another_backbone_are_refused(tmp_path):
    known = {"dataset": "d", "backbone": "dinov2_vits14", "weights": "a", "preprocessing": "224 px"}
    x = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
    config = dataclasses.replace(QUICK, num_clusters=4)
    run = train(Features(x, range(120), known), config, progress=False)
    labels = run.predict(Features(x, range(120), known | {"dataset": "others"}))
    np.testing.assert_array_equal(labels, run.labels)
    np.testing.assert_array_equal(run.predict(x), run.labels)  # of which nothing is known
    np.testing.assert_array_equal(run.predict(Features.from_array(x)), run.labels)
    renamed = Features(x, range(120), known | {"backbone": "dinov2_vits14@224"})  # the same one
    np.testing.assert_array_equal(run.predict(renamed), run.labels)
    for key in ("backbone", "weights", "preprocessing"):
        named = known if key != "backbone" else {"dataset": "d", "backbone": "dinov2_vits14"}
        other = Features(x, range(120), named | {key: "another"})
        for ask in (run.predict, run.inputs, partial(assignments, run)):
            with pytest.raises(ValueError, match=f"{key} 'another' here, '{known[key]}' in the"):
                ask(other)
