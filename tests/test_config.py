import dataclasses

import numpy as np
import pytest

from temi.config import RECIPES, RunOptions, TrainConfig


def test_settings_come_from_the_recipe_unless_given():
    for recipe, values in RECIPES.items():
        config = TrainConfig(recipe=recipe, beta=0.9)
        for name, value in values.items():
            assert getattr(config, name) == (0.9 if name == "beta" else value)


def test_paper_recipe_holds_the_published_settings():
    paper = TrainConfig(recipe="paper")
    assert (paper.learning_rate, paper.warmup_epochs, paper.schedule) == (1e-4, 20, "constant")
    assert (paper.beta, paper.student_temp, paper.teacher_temp) == (0.6, 0.1, 0.1)
    assert (paper.num_heads, paper.num_neighbors, paper.batch_size) == (16, 50, 512)
    assert (paper.teacher_momentum, paper.weight_decay, paper.epochs) == (0.996, 1e-4, 100)
    assert paper.normalize == "none"


def test_best_adds_to_fast():
    best, fast = TrainConfig(recipe="best"), TrainConfig()
    assert best == dataclasses.replace(fast, recipe="best", mutual_neighbors=True)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("beta", 0.0, "a number above 0 up to 1"),
        ("beta", -0.5, "a number above 0 up to 1"),
        ("beta", 1.5, "a number above 0 up to 1"),
        ("beta", float("nan"), "a number above 0 up to 1"),
        ("beta", "0.6", "a number above 0 up to 1"),
        ("num_heads", 0, "a whole number from 1"),
        ("num_heads", -3, "a whole number from 1"),
        ("num_heads", True, "a whole number from 1"),
        ("num_clusters", 1, "a whole number or None from 2"),
        ("batch_size", 0, "a whole number from 1 or 'auto'"),
        ("batch_size", "most", "a whole number from 1 or 'auto'"),
        ("epochs", 0, "a whole number from 1"),
        ("epochs", 100.0, "a whole number from 1"),
        ("learning_rate", float("inf"), "a number above 0 up to 100"),
        ("teacher_momentum", 1.0, "a number from 0 below 1"),
        ("recipe", "slow", "one of 'fast', 'best', 'paper'"),
        ("loss", "info", "one of 'temi', 'wmi', 'pmi', 'scan'"),
        ("normalize", "whiten", "one of 'none', 'l2', 'center-l2'"),
        ("device", 3, "text"),
    ],
)
def test_bad_values_are_named_in_one_line(name, value, allowed):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        TrainConfig(**{name: value})
    assert str(error.value) == f"{name}={value!r}: {allowed} is allowed"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("resume", 3, "text or a path or None"),
        ("overwrite", 1, "True or False"),
        ("on_divergence", "ignore", "one of 'stop', 'retry'"),
        ("checkpoint_every", 0, "a whole number from 1"),
        ("keep_checkpoints", -1, "a whole number from 0"),
        ("best_by", "acc", "one of 'loss', 'accuracy'"),
        ("log_every", 0.5, "a whole number from 1"),
        ("keep_rows", "disk", "one of 'auto', 'device', 'host', 'file'"),
    ],
)
def test_bad_options_are_named_in_one_line(name, value, allowed):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        RunOptions(**{name: value})
    assert str(error.value) == f"{name}={value!r}: {allowed} is allowed"


def test_settings_that_go_together():
    with pytest.raises(ValueError, match="overwrite=True: would remove what resume='auto'"):
        RunOptions(resume="auto", overwrite=True)
    for settings in (dict(teacher_temp_start=0.04), dict(temp_warmup_epochs=3)):
        with pytest.raises(ValueError, match=r"temp_warmup_epochs=[03]: goes with teacher_temp_"):
            TrainConfig(**settings)


def test_a_batch_to_be_found_is_within_any_number_of_images():
    assert TrainConfig(batch_size="auto").resolve(50, 10).batch_size == "auto"


def test_whole_numbers_do_for_real_ones():
    assert TrainConfig(beta=1).beta == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_clusters=201), "num_clusters=201: at most 200 is allowed with 200 images"),
        (dict(num_neighbors=200), "num_neighbors=200: at most 199 is allowed with 200 images"),
        (dict(batch_size=201), "batch_size=201: at most 200 is allowed with 200 images"),
        (dict(), "num_clusters=None: these images have no known classes"),
    ],
)
def test_settings_are_held_against_the_data(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings).resolve(200, None if not settings else 10)
    with pytest.raises(ValueError, match="num_clusters=None: these images have one class; give"):
        TrainConfig().resolve(200, 1)


def test_number_of_clusters_is_that_of_the_classes():
    assert TrainConfig().resolve(1797, 10).num_clusters == 10
    assert TrainConfig(num_clusters=20).resolve(1797, 10).num_clusters == 20


def test_changes_name_what_differs_from_the_recipe():
    config = TrainConfig(num_clusters=7, recipe="paper", beta=0.7, seed=2, device="cpu")
    assert config.changes() == {"num_clusters": 7, "beta": 0.7, "seed": 2}
    assert dataclasses.replace(config, num_clusters=None, beta=0.6, seed=0).changes() == {}


def test_the_batch_of_the_recipe_is_cut_to_few_images():
    assert TrainConfig(num_clusters=3).resolve(20).batch_size == 20
    assert TrainConfig(num_clusters=3, batch_size="auto").resolve(20).batch_size == "auto"
    assert TrainConfig(num_clusters=3).resolve(2000).batch_size == 128


@pytest.mark.parametrize(
    ("images", "settings", "epochs"),
    [
        (10**6, {}, 4),
        (5000, {}, 8),  # 40,000 images
        (1797, {}, 20),
        (1000, {}, 38),  # 260 steps, the last epoch whole
        (600, {}, 65),  # 260 steps
        (100, {}, 260),  # steps of all images
        (100, {"batch_size": "auto"}, 260),
        (600, {"batch_size": 600}, 67),  # 40,000 images before 260 steps
        (600, {"batch_size": 30}, 20),  # 400 steps
        (600, {"epochs": 3}, 3),
        (600, {"recipe": "paper"}, 100),
    ],
)
def test_the_fewer_the_images_the_more_epochs(images, settings, epochs):
    assert TrainConfig(num_clusters=3, **settings).resolve(images).epochs == epochs


def test_numbers_from_arrays_are_numbers():
    config = TrainConfig(num_clusters=np.int64(5), beta=np.float32(0.5), group_size=np.int32(3))
    assert config == TrainConfig(num_clusters=5, beta=0.5, group_size=3)
    assert {type(config.num_clusters), type(config.beta)} == {int, float}
    with pytest.raises(ValueError, match=r"num_clusters=5\.0: a whole number or None from 2"):
        TrainConfig(num_clusters=np.float64(5))


def test_no_limit_is_none_not_infinite():
    with pytest.raises(ValueError, match="clip_grad=inf: a number or None above 0 is allowed"):
        TrainConfig(clip_grad=float("inf"))


def test_limits_are_said_to_the_last_digit():
    with pytest.raises(ValueError, match="a whole number from 0 below 4294967296 is allowed"):
        TrainConfig(seed=2**32)
