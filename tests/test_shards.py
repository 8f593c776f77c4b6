"""One extraction by several processes: under torchrun, or as jobs that know of no other."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_extraction import Tiny, embedded_whole, options, prepare, stored, tiny

import temi
from temi import cache, distributed
from temi.__main__ import main
from temi.blocks import Blocks
from temi.files import wait_until

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
import test_extraction as t
from temi import cache, distributed, extraction

class Noted(extraction._Batches):
    def __getitem__(self, index):
        with open({decoded!r}, "a") as file:
            file.write(f"{{self.starts[index]}}\\n")
        return super().__getitem__(index)

class Deadly(t.Tiny):
    def forward(self, x):
        if {kill} and distributed.rank() == 1 and self.calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)

extraction.SAVE_SECONDS, extraction._Batches, t.Tiny = 0.0, Noted, Deadly
cache.load_backbone = lambda *_, **__: t.tiny(pause={pause})
features = t.embed(t.load_images({images!r}), "tiny", **t.options(t.Path({place!r})))
line = f"ids {{len(features)}} {{features.ids[-1]}} {{features.x.shape}}\\n"
sys.stdout.write(line)  # at once, so that no other rank's comes in between
"""


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def program(tmp_path: Path, images: Path, processes: int, kill: bool = False, pause: float = 0.0):
    """Embed under torchrun; also which batches were decoded, by their first rows."""
    decoded, file = tmp_path / "decoded", tmp_path / "program.py"
    decoded.unlink(missing_ok=True)
    file.write_text(PROGRAM.format(
        tests=str(ROOT / "tests"), decoded=str(decoded), kill=kill, pause=pause,
        images=str(images), place=str(tmp_path),
    ))  # fmt: skip
    done = torchrun(processes, str(file))
    return done, sorted(map(int, decoded.read_text().split()))


def rows_on_disk(place: Path) -> list[int]:
    """Rows that the logs name, for blocks of one batch of 8."""
    logs = place.rglob("cache/**/parts/*/*.json")
    done = {8 * int(log.stem): json.loads(log.read_text())["rows"] for log in logs}
    return sorted(start for start, rows in done.items() if rows)


def jpegs(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for row in range(count):
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row:03d}.jpg")
    return folder


def arguments(folder: Path, data_dir: Path, *more: str) -> list[str]:
    return ["embed", str(folder), "--image-size", "6", "--batch-size", "8", "--num-workers", "0",
            "--data-dir", str(data_dir), *more]  # fmt: skip


@pytest.mark.filterwarnings("default")
def test_torchrun_writes_the_cache_of_one_process(tmp_path, capsys):
    photos = jpegs(tmp_path / "photos", 60)
    (photos / "007.jpg").write_bytes(b"no image")  # of rank 0
    (photos / "012.jpg").write_bytes(b"")  # of rank 1
    assert main(arguments(photos, tmp_path / "alone" / "cache")) == 0
    assert re.match(r"warning: 2 of 60 images .* 007\.jpg", capsys.readouterr().err)
    done = torchrun(2, "-m", "temi", *arguments(photos, tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("images: 58") == 1
    assert done.stderr.count("images left out") == 1
    expected = stored(tmp_path / "alone")
    assert set(expected) == {"embeddings.npy", "ids.json", "manifest.json", "unreadable.csv"}
    assert stored(tmp_path) == expected


def test_a_killed_rank_loses_nothing_that_another_number_of_ranks_needs(folder, tmp_path, use):
    images = embedded_whole(folder, tmp_path, use)
    done, _ = program(tmp_path, folder, processes=2, kill=True, pause=0.1)
    assert done.returncode != 0
    there = rows_on_disk(tmp_path)
    assert {8, 24} <= set(there) < set(range(0, 60, 8))  # rank 1 had 8, 24, 40, 56
    shutil.copytree(tmp_path / "cache", tmp_path / "one" / "cache")

    done, decoded = program(tmp_path, folder, processes=3)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("ids 60 059.png (60, 5)") == 3  # all ranks have them
    assert sorted(there + decoded) == list(range(0, 60, 8))
    assert stored(tmp_path) == stored(tmp_path / "whole")

    backbone = use(tiny())
    temi.embed(images, "tiny", **options(tmp_path / "one"))
    assert backbone.model.calls == 8 - len(there)
    assert stored(tmp_path / "one") == stored(tmp_path / "whole")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_shards_in_any_order_make_the_cache_of_one_process(tmp_path, order, capsys):
    photos = jpegs(tmp_path / "photos", 60)
    for row in (3, 9, 55):  # of shards 1, 2, 1
        (photos / f"{row:03d}.jpg").write_bytes(b"no image")
    main(arguments(photos, tmp_path / "alone" / "cache"))
    assert capsys.readouterr().err.startswith("warning: 3 of 60")
    own = {1: 32, 2: 28}  # images of a shard: batches 0, 2, 4, 6 and 1, 3, 5, 7
    capsys.readouterr()
    for shard, missing in zip(order, (own[order[1]], 0), strict=True):
        more = ["--shard", f"{shard}/2", "--json-summary"]
        assert main(arguments(photos, tmp_path / "cache", *more)) == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary == {"images": 60, "shard": f"{shard}/2", "missing": missing}
    assert stored(tmp_path) == stored(tmp_path / "alone")
    table = pd.read_csv(next(tmp_path.rglob("cache/**/unreadable.csv")))
    assert table["id"].tolist() == ["003.jpg", "009.jpg", "055.jpg"]
    assert not list(tmp_path.rglob("cache/**/parts"))


def test_embeddings_of_another_size_leave_shares_that_are_not_done(folder, tmp_path):
    images, options = temi.load_images(str(folder)), dict(data_dir=tmp_path / "cache")
    sized = partial(temi.embed_shard, images, batch_size=8, image_size=6, progress=False)
    assert sized(shard="1/2", **options) == 28
    temi.embed(images, image_size=5, progress=False, **options)
    changed = images.keep(images.ids[1:])
    with pytest.warns(UserWarning, match="computed anew: preprocessing was"):
        assert sized(shard="2/2", **options) == 0  # the first share was there
    assert not list(tmp_path.rglob("cache/**/parts"))
    with pytest.warns(UserWarning, match="computed anew"):
        assert temi.embed_shard(changed, batch_size=8, shard="1/2", progress=False, **options)
    with pytest.warns(UserWarning, match="computed anew"):
        temi.embed(images, image_size=5, progress=False, **options)
    assert not list(tmp_path.rglob("cache/**/parts"))  # nobody will go on with those


@pytest.mark.parametrize("shard", ["0/2", "3/2", "x", "1/0", "1/2/3", "-1/2", "1.0/2"])
def test_a_wrong_shard_is_said_in_one_line(tmp_path, shard, capsys):
    photos = jpegs(tmp_path / "photos", 2)
    assert main(arguments(photos, tmp_path / "cache", f"--shard={shard}")) == 1
    error = capsys.readouterr().err
    assert error == f"error: shard={shard!r}: None or '1/N' to 'N/N' is allowed, as '1/8'\n"
    assert not (tmp_path / "cache").exists()


def test_a_plain_call_computes_what_shards_left(folder, tmp_path, use):
    images = embedded_whole(folder, tmp_path, use)
    assert temi.embed_shard(images, "tiny", shard="12/12", **options(tmp_path)) == 60  # empty
    assert temi.embed_shard(images, "tiny", shard="3/3", **options(tmp_path)) == 44
    backbone = use(tiny())
    default = options(tmp_path) | {"batch_size": None}  # the recorded one
    temi.embed(images, "tiny", **default)
    assert backbone.model.calls == 6
    assert stored(tmp_path) == stored(tmp_path / "whole")
    assert temi.embed_shard(images, "tiny", shard="1/3", **options(tmp_path)) == 0
    assert backbone.model.calls == 6


def test_shards_of_other_settings_are_never_mixed(folder, tmp_path, use):
    use(tiny())
    images = temi.load_images(str(folder))
    for seed, more in ((1, {}), (0, {"dtype": "float32"}), (0, {"batch_size": 4})):
        use(tiny(seed=seed))
        temi.embed_shard(images, "tiny", shard="1/2", **(options(tmp_path) | more))
    use(tiny())
    temi.embed(images, "tiny", **options(tmp_path / "whole"))
    assert temi.embed_shard(images, "tiny", shard="2/2", **options(tmp_path)) == 32
    assert temi.embed_shard(images, "tiny", shard="1/2", **options(tmp_path)) == 0
    others = list((tmp_path / "cache").rglob("parts/*"))
    assert len(others) == 2  # shares of the other seed and dtype, which are not done
    for path in others:
        shutil.rmtree(path)
    assert stored(tmp_path) == stored(tmp_path / "whole")


def test_force_recomputes_a_share_and_keeps_the_old_cache_until_then(folder, tmp_path, use):
    use(tiny())
    images = temi.load_images(str(folder))
    temi.embed(images, "tiny", **options(tmp_path))
    before = stored(tmp_path)
    backbone = use(tiny())
    forced = options(tmp_path, force_recompute=True)
    for calls in (4, 8):  # the same share again is computed again
        assert temi.embed_shard(images, "tiny", shard="1/2", **forced) == 28
        assert backbone.model.calls == calls
        assert {name: stored(tmp_path)[name] for name in before} == before
    assert temi.embed_shard(images, "tiny", shard="2/2", **forced) == 0
    assert stored(tmp_path) == before


def test_smaller_passes_of_one_job_are_recorded_with_their_rows(folder, tmp_path, use):
    images = temi.load_images(str(folder))
    use(tiny())
    temi.embed_shard(images, "tiny", shard="1/2", **options(tmp_path))
    use(tiny(most=4))
    temi.embed_shard(images, "tiny", shard="2/2", **options(tmp_path))
    (manifest,) = tmp_path.rglob("manifest.json")
    sizes = json.loads(manifest.read_text())["forward_sizes"]
    assert sizes == [[0, 8], [8, 4], [16, 8], [24, 4], [32, 8], [40, 4], [48, 8], [56, 4]]


def test_what_goes_on_after_memory_was_short_does_not_try_again(folder, tmp_path, use):
    images = temi.load_images(str(folder))
    use(tiny(most=3))
    temi.embed_shard(images, "tiny", shard="1/8", **options(tmp_path))
    backbone = use(tiny(most=3))
    features = temi.embed(images, "tiny", **options(tmp_path))
    assert features.manifest["forward_sizes"] == [[0, 8], [0, 4], [0, 2]]
    assert backbone.model.calls == 26  # passes of two, for 52 images


def test_jobs_whose_pixels_differ_in_size_are_told(folder, tmp_path):
    for row in range(8, 16):
        Image.new("RGB", (9, 9), "red").save(folder / f"{row:03d}.png")
    images = temi.load_images(str(folder))
    mine = options(tmp_path)
    temi.embed_shard(images, "pixels", shard="2/8", **mine)
    with pytest.raises(ValueError, match=r"000\.png' is 10 x 12 x 3 where those before are 9 x 9"):
        temi.embed(images, "pixels", **mine)
    for shard in (1, *range(3, 9)):  # at the same time, so that none sees what the other has
        temi.embed_shard(images, "pixels", shard=f"{shard}/8", **options(tmp_path / "b"))
    (target,) = (tmp_path / "b").rglob("parts/*")
    for file in (tmp_path / "cache").rglob("parts/*/00001.*"):
        shutil.copy(file, target)
    with pytest.raises(ValueError, match=r"008\.png' is 9 x 9 x 3 where those before are 10 x 12"):
        temi.embed(images, "pixels", **options(tmp_path / "b"))


@pytest.mark.parametrize("moment", ["before the logs", "before the rows", "before the move"])
def test_two_jobs_may_join_at_the_same_time(folder, tmp_path, use, monkeypatch, moment):
    images = embedded_whole(folder, tmp_path, use)
    place, name = {
        "before the logs": (Blocks, "logs"),
        "before the rows": (Blocks, "join"),
        "before the move": (cache, "sha256"),
    }[moment]
    original, publish = getattr(place, name), cache._publish
    mine: list = []

    def overtaken(*given):
        if mine:  # the other job joins all of it first
            found = mine.pop()
            assert publish(*found, complete=False) == 0
        return original(*given)

    def noted(*given, complete):
        mine.append(given)
        return publish(*given, complete=complete)

    monkeypatch.setattr(cache, "_publish", noted)
    monkeypatch.setattr(place, name, overtaken)
    assert temi.embed_shard(images, "tiny", shard="1/1", **options(tmp_path)) == 0
    assert not mine
    assert stored(tmp_path) == stored(tmp_path / "whole")
    assert not list(tmp_path.rglob("cache/**/parts"))


def test_blocks_that_another_job_is_removing_are_not_read(folder, tmp_path, use, monkeypatch):
    use(tiny())
    images = temi.load_images(str(folder))
    join, publish, given = Blocks.join, cache._publish, []

    def cut_short(path, *_, **__):
        for rows in sorted(Path(path).rglob("*.rows"))[:1]:
            rows.unlink()

    def overtaken(*arguments):
        if given:
            with monkeypatch.context() as patch:
                patch.setattr("shutil.rmtree", cut_short)
                publish(*given.pop(), complete=False)
        return join(*arguments)

    def noted(*arguments, complete):
        given.append(arguments)
        return publish(*arguments, complete=complete)

    monkeypatch.setattr(cache, "_publish", noted)
    monkeypatch.setattr(Blocks, "join", overtaken)
    assert temi.embed_shard(images, "tiny", shard="1/1", **options(tmp_path)) == 0
    assert temi.embed(images, "tiny", **options(tmp_path)).x.shape == (60, 5)


def test_a_block_whose_rows_are_cut_short_is_computed_again(folder, tmp_path, use):
    images = embedded_whole(folder, tmp_path, use)
    temi.embed_shard(images, "tiny", shard="1/2", **options(tmp_path))
    rows = sorted(tmp_path.rglob("*.rows"))
    rows[1].write_bytes(rows[1].read_bytes()[:-2])
    rows[2].write_bytes(rows[2].read_bytes() + b"beyond what the log names")
    backbone = use(tiny())
    temi.embed(images, "tiny", **options(tmp_path))
    assert backbone.model.calls == 5
    assert stored(tmp_path) == stored(tmp_path / "whole")


def test_blocks_of_several_batches_go_on_within_a_block(folder, tmp_path, use, monkeypatch):
    monkeypatch.setattr("temi.blocks.MOST", 3)  # 24 rows, three batches each
    for row in (1, 9, 30):
        (folder / f"{row:03d}.png").write_bytes(b"no image")
    images = temi.load_images(str(folder), labels=None)
    backbone = use(tiny())
    kept = [row for row in range(60) if row not in (1, 9, 30)]
    pixels = torch.stack([torch.from_numpy(prepare(images.images[row])) for row in kept])
    expected = backbone.model(pixels).detach().numpy()
    given = options(tmp_path, precision="fp32")

    def interrupt(self, x, forward=Tiny.forward):
        if self.calls == 2:  # the third of the batches 0 to 2 and 6, 7
            raise KeyboardInterrupt
        return forward(self, x)

    backbone.model.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            temi.embed_shard(images, "tiny", shard="1/2", **given)
    with pytest.warns(UserWarning, match="3 of 60"):
        features = temi.embed(images, "tiny", **given)
    assert backbone.model.calls == 8
    assert features.ids == tuple(f"{row:03d}.png" for row in kept)
    np.testing.assert_allclose(features.x, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 60, 1797, 10_000, 1_281_167, 50_000_000])
@pytest.mark.parametrize("batch_size", [1, 20, 64, 512, 100_000])
def test_blocks_cover_all_rows_on_the_grid_of_the_batches(num_rows, batch_size):
    blocks = Blocks(Path(), {}, num_rows, batch_size, "float16")
    spans = [blocks.rows(block) for block in range(len(blocks))]
    assert spans[0].start == 0
    assert spans[-1].stop == num_rows
    assert all(a.stop == b.start for a, b in itertools.pairwise(spans))
    assert all(span.start % batch_size == 0 and len(span) for span in spans)
    assert len(spans) <= 256 or len(spans[0]) > 65_536 - batch_size
    assert len(spans[0]) < 65_536 + batch_size


def test_the_log_of_a_process_that_is_further_stays(tmp_path):
    blocks = Blocks.find(tmp_path, {}, 5120, "float16", 10, lambda: 10)
    log = {"unreadable": {}, "forward_sizes": [[0, 10]], "shape": [2, 2], "dim": 3}
    x = np.arange(60, dtype=np.float16).reshape(20, 3)
    for rows in (20, 10):
        blocks.save(0, log | {"rows": rows}, [(0, x[:rows])])
        assert blocks.log(0)["rows"] == len(blocks.rows(0)) == 20


def test_what_a_network_shows_late_is_waited_for():
    answers = iter([False, True])
    assert wait_until(lambda: next(answers))
    assert not wait_until(lambda: False, seconds=0)


def test_a_progress_bar_counts_the_images_of_the_share(folder, tmp_path, use, monkeypatch):
    use(tiny())
    images = temi.load_images(str(folder))
    bars = []

    class Bar(distributed.tqdm):
        def __init__(self, **given):
            bars.append((given["initial"], given["total"]))
            super().__init__(**given)

    monkeypatch.setattr(distributed, "tqdm", Bar)
    temi.embed_shard(images, "tiny", shard="1/2", **options(tmp_path))
    temi.embed(images, "tiny", **options(tmp_path))
    assert bars == [(0, 32), (32, 60)]


def test_rows_are_on_disk_before_the_log_names_them(tmp_path, monkeypatch):
    found = Blocks.find(tmp_path, {}, 4, "float32", 4, lambda: 4)
    done = []
    monkeypatch.setattr(os, "fsync", lambda file, sync=os.fsync: (done.append("rows"), sync(file)))
    monkeypatch.setattr("temi.blocks.write_json", lambda *_, **__: done.append("log"))
    found.save(0, {"rows": 4, "unreadable": {}, "dim": 2}, [(0, np.ones((4, 2), np.float32))])
    assert done == ["rows", "log"]


def test_a_job_misses_what_any_of_its_spaces_misses(tmp_path):
    images = temi.load_images("digits")
    given = dict(data_dir=tmp_path, batch_size=256, num_workers=0, progress=False)
    temi.embed(images, "pixels@6", **given)
    left = temi.embed_shard(images, "pixels@4+pixels@6", shard="1/2", **given)
    assert left > 0
    assert temi.embed_shard(images, "pixels@4+pixels@6", shard="2/2", **given) == 0
