"""The messages that the page quotes for when something goes wrong are those that one sees."""

import errno
import json
import re
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import temi
from temi import checkpoints, devices, distributed, extraction, rows, trouble, weights
from temi.backbones import check_backbone
from temi.cache import load_cached
from temi.config import RunOptions, TrainConfig
from temi.embeddings import check_embeddings
from temi.files import RESULTS, SETTINGS, whole_file
from temi.rundirs import find_place
from temi.steps import training_step

PAGE = (Path(__file__).parents[1] / "troubleshooting.md").read_text()
QUOTED = re.findall(r"```text\n(.+?)\n```", PAGE)
CPU = torch.device("cpu")


def a_step_that_does_not_fit(_, monkeypatch):
    def step(state, views, *arguments):
        if len(views) > 32:
            raise MemoryError
        return training_step(state, views, *arguments)

    monkeypatch.setattr(trouble, "training_step", step)
    config = TrainConfig(num_clusters=4, num_heads=2, batch_size=64, group_size=2)
    raise MemoryError(trouble.what_fits(config, torch.randn(64, 8)))


def embeddings_that_do_not_fit(_, monkeypatch):
    monkeypatch.setattr(rows, "available_memory", lambda _: 900)
    temi.train(np.eye(60, 8) + 1, TrainConfig(num_clusters=4, batch_size=8))


def an_image_that_does_not_fit(*_):
    def model(_):
        raise MemoryError

    extraction._forward(model, torch.zeros(1, 4, 4), [[0, 1]], 0, "fp32", CPU)


def a_full_disk(folder, _):
    with whole_file(folder / "table.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")


def a_lost_process(*_):
    raise distributed.RankLostError


def a_batch_that_cannot_be_shared(_, monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    distributed.check_divides(129)


def steps_too_long(*_):
    raise trouble.DivergenceError(17, 100, [1], 0.002)


def embeddings_with_nan(*_):
    check_embeddings(np.array([[1.0, 2.0], [np.nan, 0.0]]))


def a_collapse(*_):
    raise trouble.DivergenceError(2, None, [0, 3], 0.004)


def heads_that_learned_nothing(*_):
    config = TrainConfig(num_clusters=10)
    trouble.check_learned(np.full(16, -0.8 * np.log(10) / 10), config)


def no_network_for_images(folder, monkeypatch):
    def refuse(*_, **__):
        raise URLError("no network here")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    temi.load_images("cifar10", data_dir=folder)


def no_network_for_weights(_, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no network here")

    monkeypatch.setattr("timm.create_model", refuse)
    temi.load_backbone("dinov2_vitb14")


def no_package_of_weights(_, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    check_backbone("efficientnet_lite0")


def weights_of_another_model(*_):
    weights.check_tensors("dinov2_vits14", "x.pth", {}, {"register_tokens": (1, 4, 384)})


def no_such_data(*_):
    temi.load_images("photoz")


def no_images(folder, _):
    temi.load_images(str(folder))


def photos(folder, *names):
    for name in names:
        Image.new("L", (4, 4), 200).save(folder / name)
    return temi.load_images(str(folder))


def an_empty_file(folder, _):
    (folder / "b.png").touch()
    temi.embed(photos(folder, "a.png", "c.png"), data_dir=folder / ".data", progress=False)


def a_new_image(folder, _):
    for names in (("a.png", "b.png"), ("c.png",)):
        temi.embed(photos(folder, *names), data_dir=folder / ".data", progress=False)


def a_damaged_cache(folder, _):
    images = photos(folder, "a.png")
    for _ in range(2):
        temi.embed(images, data_dir=folder / ".data", progress=False)
        (array,) = (folder / ".data").rglob("embeddings.npy")
        array.write_bytes(array.read_bytes()[:-1] + b"?")


def no_cache_any_more(folder, _):
    load_cached({"dataset": "photos", "backbone": "pixels", "sha256": "0"}, folder)


def an_unfinished_run(folder, _):
    (folder / SETTINGS).write_text("{}")
    find_place(folder, {"beta": 0.6}, RunOptions())


def a_run_of_other_settings(folder, _):
    (folder / SETTINGS).write_text(json.dumps({"beta": 0.6}))
    (folder / RESULTS).write_text(json.dumps({"finished": True}))
    find_place(folder, {"beta": 0.7}, RunOptions())


def a_cut_checkpoint(folder, _):
    for epoch in (1, 2):
        checkpoints.save_latest(folder, {}, checkpoints.Position(0, epoch, 0))
    latest = folder / checkpoints.LATEST
    latest.write_bytes(latest.read_bytes()[:-100])
    checkpoints.newest(folder)


def a_misspelt_parameter(*_):
    cells = ["", "# Parameters\nbeta: float = None", "# Parameters\nbta = 0.7\n", "import temi"]
    temi.read_parameters({"In": cells, "beta": None, "bta": 0.7})


def no_whole_number(*_):
    TrainConfig(epochs=100.0)


def no_number_of_clusters(*_):
    TrainConfig().resolve(60)


def a_batch_larger_than_the_data(*_):
    TrainConfig(num_clusters=4, batch_size=256).resolve(60)


def no_such_device(*_):
    devices.resolve_device("cuda:7")


def no_bf16(_, monkeypatch):
    for name in ("has_bf16", "runs_bf16"):
        monkeypatch.setattr(devices, name, lambda _: False)
    devices.check_precision("bf16", CPU)


SITUATIONS = [  # as they stand on the page
    a_step_that_does_not_fit, embeddings_that_do_not_fit, an_image_that_does_not_fit, a_full_disk,
    a_lost_process, a_batch_that_cannot_be_shared, steps_too_long, embeddings_with_nan, a_collapse,
    heads_that_learned_nothing, no_network_for_images, no_network_for_weights,
    no_package_of_weights, weights_of_another_model, no_such_data, no_images, an_empty_file,
    a_new_image, a_damaged_cache, no_cache_any_more, an_unfinished_run, a_run_of_other_settings,
    a_cut_checkpoint, a_misspelt_parameter, no_whole_number, no_number_of_clusters,
    a_batch_larger_than_the_data, no_such_device, no_bf16,
]  # fmt: skip


@pytest.mark.parametrize(
    ("situation", "quoted"),
    [pytest.param(*pair, id=pair[0].__name__)
     for pair in zip(SITUATIONS, QUOTED, strict=True)],
)  # fmt: skip
def test_what_the_page_quotes_is_said(situation, quoted, tmp_path, monkeypatch):
    pattern = re.escape(quoted).replace("…", ".+")
    with pytest.raises((Exception, UserWarning)) as said:  # warnings are errors in the tests
        situation(tmp_path, monkeypatch)
    monkeypatch.undo()
    assert re.search(pattern, str(said.value)), str(said.value)
