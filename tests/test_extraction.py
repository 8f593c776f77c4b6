"""Extraction that is stopped, short of memory, or given images that cannot be read."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from temi import blocks, cache, extraction
from temi.backbones import Backbone
from temi.cache import embed
from temi.data import load_images

ROOT = Path(__file__).parents[1]
SIZE = 8


def prepare(image: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(image).convert("RGB").resize((SIZE, SIZE)))


class Tiny(nn.Module):
    """A convolution with fixed weights; stops where it is told to."""

    def __init__(self, seed: int = 0, most: int = 10**9, pause: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(5, 3, 3, 3, generator=generator)
        self.weight, self.most, self.pause, self.calls = nn.Parameter(weight), most, pause, 0

    def forward(self, x):
        self.calls += 1
        time.sleep(self.pause)
        if len(x) > self.most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        x = x.permute(0, 3, 1, 2).float() / 255
        return nn.functional.conv2d(x, self.weight).mean(dim=(2, 3))


def tiny(**options) -> Backbone:
    return Backbone(
        name="tiny",
        preprocessing=f"{SIZE} px",
        weights=f"seed {options.get('seed', 0)}",
        prepare=prepare,
        model=Tiny(**options).eval(),
        dim=5,
    )


def options(tmp_path, **more):
    return dict(data_dir=tmp_path / "cache", batch_size=8, num_workers=0, progress=False, **more)


def stored(tmp_path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "cache").rglob("*.*")}


def embedded_whole(folder, tmp_path, use):
    """The images of a folder, after one call has embedded them undisturbed, to compare with."""
    use(tiny())
    images = load_images(str(folder))
    embed(images, "tiny", **options(tmp_path / "whole"))
    return images


def test_values_are_those_of_the_plain_computation(folder, tmp_path, use):
    backbone = use(tiny())
    images = load_images(str(folder))
    features = embed(images, "tiny", **options(tmp_path, dtype="float32", precision="fp32"))
    with torch.inference_mode():
        rows = [backbone.model(torch.from_numpy(prepare(i))[None]) for i in images.images]
    np.testing.assert_allclose(features.x, torch.cat(rows).numpy(), rtol=1e-5, atol=1e-6)
    half = embed(images, "tiny", **options(tmp_path / "half", precision="fp32"))
    assert half.x.dtype == np.float16
    np.testing.assert_allclose(half.x, features.x, rtol=1e-3, atol=1e-5)


def test_worker_processes_change_nothing(folder, tmp_path, use):
    use(tiny())
    images = load_images(str(folder))
    alone = embed(images, "tiny", **options(tmp_path))
    several = embed(images, "tiny", **(options(tmp_path / "b") | {"num_workers": 2}))
    np.testing.assert_array_equal(several.x, alone.x)


@pytest.mark.parametrize(
    ("device", "decoding", "several"),
    [("cpu", 0.1, False), ("cpu", 0.6, True), ("mps", 0.1, True), ("mps", 0.002, False)],
)
def test_processes_decode_where_that_is_slow(device, decoding, several, monkeypatch):
    """Slow beside a forward pass of a tenth of a second; on a CPU it has to be much slower."""
    asked = {}

    class Source:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            time.sleep(decoding)
            return index

    def load(subset, num_workers, **_):
        asked["processes"] = num_workers
        return iter(subset)

    monkeypatch.setattr(extraction, "DataLoader", load)
    found = []
    for batch in extraction._decoded(Source(), None, torch.device(device)):
        found.append(batch)
        time.sleep(0.1)
    assert found == [0, 1, 2, 3, 4]
    assert (asked["processes"] > 0) == several
    assert list(extraction._decoded(Source(), 1000, torch.device(device))) == found
    assert asked["processes"] == 5  # no more than there are batches


def test_a_whole_block_of_unreadable_images(folder, tmp_path, use):
    use(tiny())
    given = options(tmp_path / "whole")
    expected = embed(load_images(str(folder)), "tiny", **given)
    for row in range(8):
        (folder / f"{row:03d}.png").write_bytes(b"no image")
    given = options(tmp_path / "broken")
    with pytest.warns(UserWarning, match="8 of 60 images left out"):
        features = embed(load_images(str(folder)), "tiny", **given)
    np.testing.assert_array_equal(features.x, expected.x[8:])


def test_unreadable_images_are_left_out_and_listed(folder, tmp_path, use):
    use(tiny())
    expected = embed(load_images(str(folder)), "tiny", **options(tmp_path / "whole"))
    for name in ("017.png", "040.png"):
        (folder / name).write_bytes(b"no image")
    images = load_images(str(folder), labels=None)
    with pytest.warns(UserWarning, match=r"2 of 60 images left out, the first, 017\.png"):
        features = embed(images, "tiny", **options(tmp_path))
    kept = [row for row in range(60) if row not in (17, 40)]
    np.testing.assert_array_equal(features.x, expected.x[kept])
    assert features.ids == tuple(f"{row:03d}.png" for row in kept)
    table = pd.read_csv(next(tmp_path.rglob("cache/**/unreadable.csv")))
    assert table["id"].tolist() == ["017.png", "040.png"]
    assert table["reason"].str.len().min() > 3
    for data_dir in ("cache", "fresh"):  # from the cache, and computed
        stopping = options(tmp_path, on_error="stop") | {"data_dir": tmp_path / data_dir}
        with pytest.raises(ValueError, match=r"image '017\.png': .*on_error='skip'"):
            embed(images, "tiny", **stopping)


def test_a_folder_without_a_readable_image_is_an_error(tmp_path, use):
    use(tiny())
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no image can be read"):
        embed(load_images(str(tmp_path)), "tiny", **options(tmp_path))


def test_a_batch_that_does_not_fit_is_halved(folder, tmp_path, use):
    use(tiny())
    expected = embed(load_images(str(folder)), "tiny", **options(tmp_path / "whole"))
    use(tiny(most=3))
    features = embed(load_images(str(folder)), "tiny", **options(tmp_path))
    np.testing.assert_allclose(features.x, expected.x, rtol=1e-2)
    assert features.manifest["forward_sizes"] == [[0, 8], [0, 4], [0, 2]]
    use(tiny(most=0))
    with pytest.raises(MemoryError, match="one image does not fit"):
        embed(load_images(str(folder)), "tiny", **options(tmp_path / "none"))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_stops_a_worker_process_is_said_in_one_line(workers, tmp_path):
    for side in (4, 4, 4, 5):
        Image.new("RGB", (side, side), "red").save(tmp_path / f"{len(os.listdir(tmp_path))}.png")
    given = options(tmp_path / "out") | {"num_workers": workers, "batch_size": 2}
    with pytest.raises(ValueError, match=r"^image '3\.png' is 5 x 5 x 3 where those.*one size$"):
        embed(load_images(tmp_path), "pixels", **given)


def test_values_beyond_half_precision_are_named(folder, tmp_path, use):
    backbone = use(tiny())
    backbone.model.weight.data *= 1e6
    with pytest.raises(ValueError, match=r"image '000\.png'.*float16; give dtype='float32'"):
        embed(load_images(str(folder)), "tiny", **options(tmp_path))


def test_images_without_a_direction_are_left_out(folder, tmp_path, use):
    Image.new("RGB", (10, 12), "black").save(folder / "030.png")
    use(tiny())
    with pytest.warns(UserWarning, match=r"1 of 60 images .* the first, 030\.png: .*all zeros"):
        features = embed(load_images(str(folder)), "tiny", **options(tmp_path))
    assert len(features) == 59
    assert "030.png" not in features.ids


def test_what_changed_is_named_and_nothing_stale_is_used(folder, tmp_path, use):
    use(tiny())
    embed(load_images(str(folder)), "tiny", **options(tmp_path))
    Image.new("RGB", (9, 9), "red").save(folder / "new.png")
    with pytest.warns(UserWarning, match=r"anew: 1 images are new \(new\.png …\)"):
        features = embed(load_images(str(folder)), "tiny", **options(tmp_path))
    assert len(features) == 61
    (folder / "new.png").unlink()
    with pytest.warns(UserWarning, match=r"anew: 1 images are gone \(new\.png …\)"):
        embed(load_images(str(folder)), "tiny", **options(tmp_path))
    Image.new("RGB", (7, 7), "blue").save(folder / "003.png")
    with pytest.warns(UserWarning, match="images of the same names have changed"):
        embed(load_images(str(folder)), "tiny", **options(tmp_path))
    other = use(tiny(seed=1))
    with pytest.warns(UserWarning, match="weights was 'seed 0', is 'seed 1'"):
        embed(load_images(str(folder)), "tiny", **options(tmp_path))
    use(dataclasses.replace(other, preprocessing="16 px"))
    with pytest.warns(UserWarning, match="preprocessing was '8 px', is '16 px'"):
        embed(load_images(str(folder)), "tiny", **options(tmp_path))


def test_an_interrupted_extraction_goes_on(folder, tmp_path, use, monkeypatch):
    images = embedded_whole(folder, tmp_path, use)
    backbone = use(tiny())

    def interrupt(self, x, forward=Tiny.forward):
        if self.calls == 3:
            raise KeyboardInterrupt
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(images, "tiny", **options(tmp_path))
    backbone.model.calls = 0
    embed(images, "tiny", **options(tmp_path))
    assert backbone.model.calls == 8 - 3  # batches
    assert stored(tmp_path) == stored(tmp_path / "whole")


@pytest.mark.parametrize("when", ["made", "moved"])
@pytest.mark.parametrize("stop_at", ["embeddings.npy", "ids.json", "unreadable.csv", "manifest"])
def test_a_stop_while_the_cache_is_written_loses_nothing(
    folder, tmp_path, use, monkeypatch, stop_at, when
):
    images = embedded_whole(folder, tmp_path, use)
    backbone = use(tiny())

    def stopping(write):
        def stop(*args):
            if stop_at in str([*args[:1], args[-1]]):
                raise KeyboardInterrupt
            return write(*args)

        return stop

    def stop_moving(source, target, move=os.replace):
        if stop_at in str(target) and "parts" not in target.parts:
            raise KeyboardInterrupt
        move(source, target)

    if when == "moved":
        monkeypatch.setattr(os, "replace", stop_moving)
    else:
        monkeypatch.setattr(blocks.Blocks, "join", stopping(blocks.Blocks.join))
        for name in ("write_json", "write_whole"):
            monkeypatch.setattr(cache, name, stopping(getattr(cache, name)))
    with pytest.raises(KeyboardInterrupt):
        embed(images, "tiny", **options(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(cache, "load_backbone", lambda *_, **__: backbone)
    backbone.model.calls = 0
    embed(images, "tiny", **options(tmp_path))
    assert backbone.model.calls == 0
    assert stored(tmp_path) == stored(tmp_path / "whole")


@pytest.fixture
def overtaken(folder, monkeypatch):
    """Let another process embed the images during the first forward pass of this one."""

    def prepare(**given):
        forward, others = Tiny.forward, [given]

        def late(self, x):
            if others:
                embed(load_images(str(folder)), "tiny", **others.pop())
            return forward(self, x)

        monkeypatch.setattr(Tiny, "forward", late)
        monkeypatch.setattr(cache, "wait_until", lambda look: look() or pytest.fail("waits"))

    return prepare


@pytest.mark.parametrize("save_seconds", [0.0, 100.0])
def test_a_process_that_another_was_faster_than_takes_its_embeddings(
    save_seconds, folder, tmp_path, use, monkeypatch, overtaken
):
    images = embedded_whole(folder, tmp_path, use)
    backbone = use(tiny())
    monkeypatch.setattr(extraction, "SAVE_SECONDS", save_seconds)
    overtaken(**options(tmp_path))
    assert embed(images, "tiny", **options(tmp_path)).x.shape == (60, 5)
    assert stored(tmp_path) == stored(tmp_path / "whole")
    assert not list(tmp_path.rglob("cache/**/parts"))
    batches = -(-60 // options(tmp_path)["batch_size"])
    assert backbone.model.calls == batches + (1 if save_seconds == 0 else batches)


def test_embeddings_that_another_process_has_put_there_meanwhile_are_held_against_what_is_wanted(
    folder, tmp_path, use, overtaken, monkeypatch
):
    use(tiny())
    for name in ("check_precision", "half_precision"):  # not every processor runs bfloat16
        monkeypatch.setattr(extraction, name, lambda *_: nullcontext())
    overtaken(**options(tmp_path, precision="bf16"))
    with pytest.raises(OSError, match="another process has put others there: precision"):
        embed(load_images(str(folder)), "tiny", **options(tmp_path, precision="fp32"))


def test_what_is_computed_by_other_settings_meanwhile_does_not_disturb(
    folder, tmp_path, use, overtaken
):
    images = embedded_whole(folder, tmp_path, use)
    use(tiny())
    overtaken(**options(tmp_path, dtype="float32"))
    assert embed(images, "tiny", **options(tmp_path)).x.dtype == np.float16
    assert stored(tmp_path) == stored(tmp_path / "whole")
    assert not list(tmp_path.rglob("cache/**/parts"))


def test_killed_three_times_gives_the_file_of_an_uninterrupted_run(folder, tmp_path, use):
    images = embedded_whole(folder, tmp_path, use)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
import test_extraction as t
from temi import cache, extraction
extraction.SAVE_SECONDS = 0.0
cache.load_backbone = lambda *_, **__: t.tiny(pause=0.3)
images = t.load_images({str(folder)!r})
print("go", flush=True)
t.embed(images, "tiny", **t.options(t.Path({str(tmp_path)!r})))
"""

    def rows_on_disk() -> int:
        logs = (tmp_path / "cache").rglob("parts/*/*.json")
        return sum(json.loads(log.read_text())["rows"] for log in logs)

    rng = random.Random(0)
    done = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT,
                                 env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
        assert child.stdout.readline() == b"go\n"
        while child.poll() is None and rows_on_disk() == (done[-1] if done else 0):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.35))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        done.append(rows_on_disk())
    assert 0 < done[0] < done[1] < done[2] <= 60
    embed(images, "tiny", **options(tmp_path))
    assert stored(tmp_path) == stored(tmp_path / "whole")


def test_pixels_of_images_that_differ_in_size(folder, tmp_path):
    Image.new("RGB", (9, 9), "red").save(folder / "058.png")
    images = load_images(str(folder))
    message = r"image '058\.png' is 9 x 9 x 3 where those before are 10 x 12 x 3: give image_size"
    for size in (1, 8, 64):  # alone in its batch, in a later one, in the first
        with pytest.raises(ValueError, match=message):
            embed(images, "pixels", **options(tmp_path) | {"batch_size": size})
    assert embed(images, "pixels", image_size=4, **options(tmp_path)).x.shape == (60, 48)


def test_unknown_values_are_named(folder, tmp_path):
    images = load_images(str(folder))
    for name, value in (("dtype", "int8"), ("on_error", "go"), ("batch_size", 0)):
        with pytest.raises(ValueError, match=f"^{name}={value!r}: .* is allowed"):
            embed(images, "pixels", **{name: value})


def test_another_precision_is_computed_anew(folder, tmp_path, use):
    backbone = use(tiny())
    images = load_images(str(folder))
    embed(images, "tiny", **options(tmp_path))  # auto
    calls = backbone.model.calls
    (file,) = tmp_path.rglob("manifest.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"precision": "bf16"}))
    with pytest.warns(UserWarning, match="computed anew: precision was 'bf16', is 'fp32'"):
        embed(images, "tiny", **options(tmp_path, precision="fp32"))
    assert backbone.model.calls == 2 * calls
    embed(images, "tiny", **options(tmp_path))  # auto takes either
    assert backbone.model.calls == 2 * calls


def test_what_waits_in_memory_is_bounded(folder, tmp_path, use, monkeypatch):
    use(tiny())
    saves = []
    save = extraction._save
    monkeypatch.setattr(extraction, "_save", lambda *args: (saves.append(1), save(*args)))
    monkeypatch.setattr(extraction, "SAVE_BYTES", 8 * 5 * 2 + 1)  # more than one batch has
    embed(load_images(str(folder)), "tiny", **options(tmp_path))
    assert len(saves) == 5  # after every second batch of eight, and at the end


def test_a_folder_that_goes_away_stops_and_loses_nothing(folder, tmp_path, use):
    images, away = load_images(str(folder)), folder.with_name("away")
    backbone = use(tiny())
    forward = backbone.model.forward

    def unplugged(pixels):
        if folder.exists():
            folder.rename(away)
        return forward(pixels)

    backbone.model.forward = unplugged
    with pytest.raises(FileNotFoundError, match="nor anything else there: bring the folder back"):
        embed(images, "tiny", **options(tmp_path))
    away.rename(folder)
    backbone.model.forward = forward
    calls = backbone.model.calls
    assert embed(images, "tiny", **options(tmp_path)).ids == images.ids
    assert backbone.model.calls == calls + 7  # of 8 batches


def test_a_single_file_that_is_gone_is_left_out(folder, tmp_path, use):
    images = load_images(str(folder))
    use(tiny())
    (folder / images.ids[3]).unlink()
    with pytest.warns(UserWarning, match="1 of 60 images left out"):
        assert len(embed(images, "tiny", **options(tmp_path))) == 59
