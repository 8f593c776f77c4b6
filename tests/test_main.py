"""The command line, as a newcomer uses it."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import temi
from temi import distributed
from temi.__main__ import _in_words, main
from temi.config import TrainConfig
from temi.files import check_writable

DIGITS = temi.load_images("digits")
QUICK = ["--num-heads", "2", "--epochs", "2", "--backbone", "pixels"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "my photos"
    folder.mkdir()
    for row, image in enumerate(DIGITS.images[:200]):
        Image.fromarray(image).save(folder / f"{row:04d}.png")
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Everything is written below a folder of the test's own."""
    monkeypatch.setenv("TEMI_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_help_names_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["cluster", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "exponent of the pair term" in text
    assert "None: 0.6 with the recipe fast" in text
    assert "clusters K; None: the images suggest a number" in text
    assert "null" not in text
    assert "Path}" not in text
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("cluster", "predict", "train", "embed"):
        assert re.search(rf"{command}  +\w+", text)


def test_cluster_then_predict(photos, tmp_path, capsys, monkeypatch):
    arguments = ["cluster", str(photos), "--num-clusters", "10", "--out", "out", *QUICK]
    assert main([*arguments, "--sort", "copy"]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    for name in ("assignments.csv", "assignments.parquet", "gallery.html", "sorted", "run"):
        assert (out / name).exists()
        assert str(out / name) in printed
    table = pd.read_csv(out / "assignments.csv")
    run = temi.load_run(out / "run")
    np.testing.assert_array_equal(table["cluster"], run.labels)
    assert len(list((out / "sorted").rglob("*.png"))) == 200

    first, alone = distributed.from_first, []  # what rank 0 does for all
    monkeypatch.setattr(distributed, "from_first", lambda make: alone.append(make) or first(make))
    assert main(["predict", "out", str(photos), "--out", "later", "--json-summary"]) == 0
    assert {check_writable, temi.write_assignments} <= {getattr(make, "func", 0) for make in alone}
    summary = json.loads(capsys.readouterr().out)  # nothing else on standard output
    assert summary["images"] == 200
    assert sum(summary["sizes"].values()) == 200
    again = pd.read_csv(tmp_path / "later" / "assignments.csv")
    np.testing.assert_array_equal(again["cluster"], table["cluster"])


def test_train_and_embed(photos, capsys):
    assert main(["embed", str(photos), "--backbone", "pixels", "--json-summary"]) == 0
    assert json.loads(capsys.readouterr().out)["shape"] == [200, 64]
    arguments = ["train", "digits", "--run-dir", "run", "--json-summary", *QUICK]
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert 0 < summary["metrics"]["acc"] < 1
    assert temi.load_run("run").config.num_heads == 2


def test_what_is_not_known_is_in_no_line():
    scores = {"acc": 0.81234, "nmi": None}
    said = _in_words(
        {"metrics": dict.fromkeys(scores), "kmeans": {"none": scores, "l2": {"acc": None}},
         "images": 12, "sizes": {0: 5, 3: 7}, "files": ["a.csv"]}
    )  # fmt: skip
    lines = ["kmeans, none: acc 0.812", "images: 12", "sizes: 0 5, 3 7", "files:", "  a.csv"]
    assert said.splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--num-clusters", "1"], 1, "num_clusters=1: a whole number or None from 2"),
        (["--num-clusters", "many"], 2, "--num-clusters 'many'"),
        (["--num-clusters", "500"], 1, "num_clusters=500: at most 200"),
        (["--backbone", "nothing"], 1, "backbone='nothing'"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_line(photos, arguments, status, message, capsys):
    assert main(["cluster", str(photos), "--out", "out", *QUICK, *arguments]) == status
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_misspelt_option_and_a_missing_folder(photos, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["cluster", str(photos), "--num-cluster-s", "3"])
    assert stop.value.code == 2
    assert main(["cluster", str(photos / "none"), "--num-clusters", "3"]) == 1
    assert "an existing folder of images" in capsys.readouterr().err


def test_as_a_process(photos, tmp_path):
    command = [sys.executable, "-m", "temi", "embed", str(photos), "--backbone", "pixels"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "shape: [200, 64]" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(("command", "advice"), [
    ("embed", "stopped; the same command goes on"),
    ("train", "stopped; the same command with --resume auto goes on"),
])  # fmt: skip
def test_ctrl_c_says_how_to_go_on(command, advice, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"temi.{command}", stop)
    assert main([command, "digits"]) == 130
    assert advice in capsys.readouterr().err


def test_what_cannot_be_is_said_before_the_images_are_embedded(photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out, more, message in [
        (tmp_path / "file", [], "out='.*file': nothing can be written there"),
        (tmp_path / "new", ["--batch-size", "100000"], "batch_size=100000: at most 200 is allowed"),
    ]:
        assert main(["cluster", str(photos), "--out", str(out), *QUICK, *more]) == 1
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "data").exists()


@pytest.mark.filterwarnings("default", "ignore:the heads hardly")
def test_a_few_images_one_of_them_broken_without_a_number_of_clusters(photos, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(photos.rglob("*.png"))[:60]:
        (few / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    next(few.iterdir()).write_bytes(b"broken")
    arguments = ["cluster", str(few), "--out", "groups", "--no-map", *QUICK]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.err.startswith("warning: 1 of 60 images left out")
    assert said.err.count("\n") == 1  # without the line of code that warns
    assert "is suggested by the images themselves" in said.out
    assert len(pd.read_csv(tmp_path / "groups" / "assignments.csv")) == 59
    number = str(temi.load_run(tmp_path / "groups" / "run").config.num_clusters)
    assert main([*arguments, "--num-clusters", number]) == 0
    assert capsys.readouterr().err.startswith("warning: 1 of 60 ")
    (few / "later.png").write_bytes(b"broken")
    assert main(["predict", "groups", str(few), "--json-summary"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["unreadable"]) == (59, 2)


def test_a_runs_own_tables_stay(photos, tmp_path, capsys):
    run = ["--run-dir", str(tmp_path / "r"), "--num-clusters", "4", *QUICK]
    assert main(["train", str(photos), "--backbone", "pixels", *run]) == 0
    before = (tmp_path / "r" / "assignments.csv").read_bytes()
    for out in (tmp_path / "r", tmp_path / "r" / "checkpoints", tmp_path / "r" / "new" / "of"):
        assert main(["predict", str(tmp_path / "r"), str(photos), "--out", str(out)]) == 1
        assert "holds a run and the tables of its own images" in capsys.readouterr().err
    assert not (tmp_path / "r" / "new").exists()
    assert (tmp_path / "r" / "assignments.csv").read_bytes() == before


def test_folders_that_would_mix_with_others_are_refused(photos, tmp_path, capsys):
    assert main(["cluster", str(photos), "--out", str(photos / "out"), *QUICK]) == 1
    assert "lies among the images, and would be taken for some of them" in capsys.readouterr().err
    (tmp_path / "mine" / "sorted").mkdir(parents=True)
    (tmp_path / "mine" / "sorted" / "notes.txt").touch()
    sort = ["--out", str(tmp_path / "mine"), "--sort", "copy"]
    assert main(["cluster", str(photos), *sort, *QUICK]) == 1
    assert "holds files that sort_images did not write" in capsys.readouterr().err
    assert not (tmp_path / "mine" / "run").exists()  # before any work
    for run_dir in (photos / "run", photos / ".." / photos.name / "run"):
        given = ["--run-dir", str(run_dir), "--num-clusters", "4", *QUICK]
        assert main(["train", str(photos), *given]) == 1
        assert "lies among the images, and its clusters.png would be" in capsys.readouterr().err
    assert not (photos / "run").exists()
    (tmp_path / "grouped" / "run").mkdir(parents=True)
    assert main(["predict", "anything", str(photos), "--out", str(tmp_path / "grouped")]) == 1
    assert "holds a run and the tables of its own images" in capsys.readouterr().err


def test_embeddings_are_sent_to_train(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.ones((4, 3)))
    assert main(["cluster", str(tmp_path / "x.npy")]) == 1
    assert "holds embeddings; 'python -m temi train' takes those" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:the heads hardly")  # there is nothing to find
def test_the_same_command_on_the_same_embeddings_goes_through_twice(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    command = ["train", "x.npy", "--num-clusters", "3", "--num-heads", "2", "--epochs", "1"]
    for _ in range(2):
        assert main(command) == 0
    capsys.readouterr()
    np.save(tmp_path / "x.npy", 2 * x)
    assert main(command) == 1
    assert "holds a run with other embeddings; give overwrite" in capsys.readouterr().err


def test_a_folder_is_one_data_set_wherever_it_is_named_from(photos, tmp_path, monkeypatch, capsys):
    command = ["cluster", "--num-clusters", "3", "--no-map", *QUICK]
    assert main([*command, str(photos), "--out", str(tmp_path / "out")]) == 0
    beside = tmp_path / "beside"
    beside.mkdir()
    monkeypatch.chdir(photos)
    capsys.readouterr()
    assert main([*command, "../my photos", "--out", f"{beside}/../out"]) == 0
    assert ".." not in capsys.readouterr().out
    assert len(list((tmp_path / "data" / "embeddings").iterdir())) == 1
    assert main([*command, ".", "--out", str(tmp_path / "out")]) == 0
    assert '"title":"my photos"' in (tmp_path / "out" / "gallery.html").read_text()


def test_what_is_refused_leaves_no_folder(photos, tmp_path, capsys):
    assert main(["predict", "nowhere", str(photos), "--out", "later"]) == 1
    assert main(["cluster", str(photos), "--num-clusters", "1", "--out", "later"]) == 1
    assert capsys.readouterr().err.count("error: ") == 2
    assert not (tmp_path / "later").exists()


def test_too_few_images_to_choose_by_are_not_embedded(photos, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(photos.rglob("*.png"))[:39]:
        (few / path.name).write_bytes(path.read_bytes())
    assert main(["cluster", str(few), "--out", "groups", *QUICK]) == 1
    assert "39 images are too few to choose by; give num_clusters" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_links_to_what_is_no_file_are_refused_before_any_work(tmp_path, capsys):
    assert main(["cluster", "digits", "--sort", "hardlink", "--out", "out", *QUICK]) == 1
    assert "'digits' holds no files to link to; give 'copy'" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_where_nothing_can_be_written_is_said_before_any_work(photos, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    command = ["train", str(photos), "--num-clusters", "3", *QUICK]
    for options, said in (
        (["--run-dir", "file"], "run_dir='{}/file': a file; a folder is allowed"),
        (["--run-dir", "file/run"], "run_dir='{}/file': nothing can be written there"),
        (["--data-dir", "file"], "data_dir='{}/file/"),
    ):
        assert main([*command, *options]) == 1
        assert said.format(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_too_many_heads_are_too_much_memory(photos, capsys, monkeypatch):
    def too_much(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] can't allocate memory: 3 TB")

    monkeypatch.setattr(temi, "train", too_much)
    assert main(["train", str(photos), "--num-clusters", "3", *QUICK]) == 1
    assert capsys.readouterr().err.startswith("error: not enough memory: [enforce fail")


@pytest.mark.filterwarnings("default")
def test_options_of_the_command_line_reach_what_they_are_for(tmp_path, monkeypatch, capsys):
    for part, count in (("train", 40), ("test", 10)):
        (tmp_path / "photos" / part).mkdir(parents=True)
        for row, image in enumerate(DIGITS.images[:count]):
            Image.fromarray(image).save(tmp_path / "photos" / part / f"{row}.png")
    (tmp_path / "photos" / "test" / "a.png").write_bytes(b"no image")
    given = ["--split", "test", "--data-dir", "there", "--device", "cpu"]
    options = ["--backbone", "pixels", "--json-summary"]
    command = ["embed", str(tmp_path / "photos"), *given, *options]
    assert main([*command, "--on-error", "stop"]) == 1
    assert "image 'a.png'" in capsys.readouterr().err
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 10

    asked = {}

    class Run:
        def predict(self, images, **options):
            asked.update(options, images=len(images))
            return pd.DataFrame({"cluster": [0] * 10, "outlier": [False] * 10})

    monkeypatch.setattr(temi, "load_run", lambda _: Run())
    more = ["--weights", "w.pth", "--json-summary"]
    assert main(["predict", "run", str(tmp_path / "photos"), *given, *more]) == 0
    expected = {"weights": "w.pth", "data_dir": "there", "device": "cpu", "images": 11}
    assert asked == expected


def test_the_suggestion_is_of_the_seed(tmp_path, monkeypatch):
    seeds = []

    def suggest(features, seed=0):
        seeds.append(seed)
        raise ValueError("enough")

    monkeypatch.setattr(temi, "suggest_num_clusters", suggest)
    command = ["cluster", "digits", "--out", str(tmp_path / "out"), "--backbone", "pixels"]
    assert main([*command, "--seed", "3"]) == 1
    assert seeds == [3]


def test_cluster_takes_the_options_of_a_run(tmp_path, monkeypatch):
    asked = {}

    def train(features, config, *, images, run_dir, **options):
        asked.update(options, run_dir=run_dir, width=features.x.shape[1])
        raise ValueError("enough")

    monkeypatch.setattr(temi, "train", train)
    command = ["cluster", "digits", "--out", "out", "--backbone", "pixels", "--image-size", "4"]
    options = ["--num-clusters", "4", "--resume", "auto", "--checkpoint-every", "3"]
    options += ["--keep-checkpoints", "5", "--on-divergence", "retry", "--baseline", "never"]
    assert main([*command, *options]) == 1
    expected = temi.RunOptions(
        resume="auto", checkpoint_every=3, keep_checkpoints=5, on_divergence="retry",
        baseline="never",
    )  # fmt: skip
    expected = dataclasses.asdict(expected) | {"run_dir": tmp_path / "out" / "run", "width": 48}
    assert asked == expected


def test_sorted_as_asked_for(photos, tmp_path):
    command = ["cluster", str(photos), "--out", "out", "--num-clusters", "3", "--no-map"]
    assert main([*command, *QUICK, "--sort", "symlink"]) == 0
    assert all(path.is_symlink() for path in (tmp_path / "out" / "sorted").rglob("*.png"))


def test_a_settings_file_of_another_program_is_no_run(photos, tmp_path, capsys):
    assert main(["cluster", str(photos), "--num-clusters", "4", "--no-map", *QUICK]) == 0
    (tmp_path / "config.json").write_text("{}")
    assert main(["predict", "clusters", str(photos), "--out", "predicted"]) == 0, (
        capsys.readouterr()
    )
    assert (tmp_path / "predicted" / "assignments.csv").exists()


@pytest.mark.filterwarnings("ignore:1 of 201 images left out")
def test_new_images_are_noticed_before_they_are_embedded(photos, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "growing"
    shutil.copytree(photos, folder)
    command = ["cluster", str(folder), "--num-clusters", "4", "--no-map", *QUICK]
    (folder / "broken.png").write_bytes(b"no image")  # left out, which is no difference
    assert main(command) == 0
    assert main(command) == 0
    Image.fromarray(DIGITS.images[0]).save(folder / "new.png")
    (folder / "0000.png").unlink()
    monkeypatch.setattr(temi.parameters, "embed", lambda *_, **__: 1 / 0)
    for more in ([], ["--resume", "auto"]):
        assert main([*command, *more]) == 1
        message = capsys.readouterr().err
        assert "holds a run with other images (1 new: new.png; 1 gone: 0000.png); give" in message
        assert "resume" not in message  # which does not help
    with pytest.raises(ZeroDivisionError):
        main([*command, "--overwrite"])


@pytest.mark.skipif(sys.platform != "linux", reason="paths of any bytes")
def test_a_folder_of_any_name(photos, tmp_path, capsys):
    folder = tmp_path / "caf\udce9"
    shutil.copytree(photos, folder)
    given = ["--num-clusters", "4", "--no-map", *QUICK]
    assert main(["cluster", str(folder), "--out", "out", *given]) == 0, capsys.readouterr()
    assert (tmp_path / "out" / "gallery.html").exists()
    assert main(["cluster", str(photos), "--out", str(folder / ".." / "\udce9"), *given]) == 1
    assert "no UTF-8, which TensorBoard needs" in capsys.readouterr().err


def test_a_terminal_that_cannot_show_a_name(photos, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "temi", "cluster", str(photos), "--num-clusters", "4", "--no-map",
         "--out", "\u7d44", *QUICK],
        env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    assert rb"\u7d44" in done.stdout
    assert (tmp_path / "\u7d44" / "gallery.html").exists()


def test_a_run_beside_train_and_test_is_not_among_the_images(photos, tmp_path, capsys):
    for part in ("train", "test"):
        shutil.copytree(photos, tmp_path / "work" / part)
    command = ["train", str(tmp_path / "work"), "--split", "both", "--num-clusters", "4", *QUICK]
    for inside, status in (("runs/a", 0), ("train/a", 1), ("", 1)):
        assert main([*command, "--run-dir", str(tmp_path / "work" / inside)]) == status
        assert ("lies among the images" in capsys.readouterr().err) == bool(status)
