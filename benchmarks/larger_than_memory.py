"""Claim: 10 million embeddings of 256 numbers are trained on within 3 GB of memory.

Prepared they would take 10 GB; they stay in their file of 5 GB in half precision, with neighbours
that are given. Measured:

* ``training``: some steps of 128 anchors of the recipe ``fast`` with 16 heads, in a control group
  limited to 3 GB, and everything around them: the checks, the whole epoch's groups, alignment, vote
  and record. Only what is no matter of memory is left out: the heads are asked about 20,000 images
  and not about all, which takes a processor hours. Where no control group can be made the JSON says
  so, and holds the peak of anonymous memory alone. Beside it images per second of the same steps
  with the rows in memory, of 2 million images, as 10 million prepared take 10 GB.
* ``reading``: bytes that a step reads from the disk, of an empty page cache, for its anchors and
  for its neighbours: a row of 512 bytes lies in a page of 4 KB, so neighbours that are anywhere
  cost eight times their size. And the speed of blocks of several sizes, by which
  ``temi.rows.BLOCK`` is chosen.
* ``quality``: scores of real embeddings sorted by class, the worst case, with anchors in full
  random order and in blocks: those of ``temi.rows`` in windows of an eighth of the file, as a file
  of a gigabyte has them; and a quarter of a class long, of which a window holds half as many as
  there are classes, so that two fifths of them are in it.

Linux alone; 13 GB of disk in ``--folder``, and an hour. ``--features`` is an .npz with X and y;
without it the digits are taken, whose scores differ more from seed to seed.

    python benchmarks/larger_than_memory.py --folder FOLDER --features FEATURES.npz

Writes results/benchmarks/larger_than_memory.json.
"""

import argparse
import json
import mmap
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import temi
import temi.state
import temi.training
from benchmarks.scale import AnonymousPeak, alone
from temi import rows
from temi.ensemble import head_labels
from temi.files import write_json

FILE = Path(__file__).parents[1] / "results" / "benchmarks" / "larger_than_memory.json"
IMAGES, IN_MEMORY, DIM, CLUSTERS, NEIGHBORS = 10_000_000, 2_000_000, 256, 100, 10
BATCH, GROUP = 128, 4  # of the recipe fast
ASKED = 20_000  # images that the heads are asked about before and after the steps
NEAR = 300  # rows at most to a clustered neighbour


def make(folder: str, images: int) -> None:
    """Embeddings, and neighbours anywhere ("random") and within some hundred rows ("clustered")."""
    random = np.random.default_rng(0)
    x = np.lib.format.open_memmap(Path(folder) / f"{images}.npy", "w+", np.float16, (images, DIM))
    for start in range(0, images, 65536):  # whole numbers, as they are drawn the fastest
        part = x[start : start + 65536]
        part[:] = random.integers(-128, 128, part.shape, dtype=np.int8)
    x.flush()
    for kind, most in (("random", images - 1), ("clustered", NEAR)):
        file = Path(folder) / f"{kind}-{images}.npy"
        near = np.lib.format.open_memmap(file, "w+", np.int32, (images, NEIGHBORS))
        for start in range(0, images, 65536):
            own = np.arange(start, min(images, start + 65536), dtype=np.int32)[:, None]
            shift = random.integers(1, most + 1, (len(own), NEIGHBORS), dtype=np.int32)
            if kind == "clustered":
                shift *= 2 * random.integers(2, size=shift.shape, dtype=np.int32) - 1
            near[start : start + 65536] = (own + shift) % images
        near.flush()


def opened(folder: str, name: str) -> np.ndarray:
    return np.load(Path(folder) / f"{name}.npy", mmap_mode="r")


def forget(folder: str) -> None:
    """Take the folder's files out of the page cache."""
    for file in Path(folder).glob("*.npy"):
        with open(file, "rb") as content:
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """What this process has caused to be read from the disk."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


@contextmanager
def control_group(limit: int) -> Iterator[Path | None]:
    """Within this context, this process and those it starts are in a control group of their own.

    It lies below the group they were in. Yields its folder, or None where it cannot be made.
    """
    group = before = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, or 1
            before = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            if (before / "memory.stat").exists():
                group = before / f"temi-{os.getpid()}"
                break
    if group is not None:
        try:
            group.mkdir()
            (group / name).write_text(str(limit))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            print(f"no control group: {error}", flush=True)
            if group.exists():
                group.rmdir()
            group = None
    try:
        yield group
    finally:
        if group is not None:
            for process in (group / "cgroup.procs").read_text().split():  # a helper of spawn's too
                (before / "cgroup.procs").write_text(process)
            group.rmdir()


def group_says(group: Path) -> dict:
    """The peak of a group's memory, cached files included, and how often it was at its limit."""
    for peak, failures in (("memory.peak", None), ("memory.max_usage_in_bytes", "memory.failcnt")):
        if (group / peak).exists():
            found = {"group_peak_gb": int((group / peak).read_text()) / 1e9}
            if failures:
                found["times_at_limit"] = int((group / failures).read_text())
            return found
    return {}


def cut_labels(heads, x) -> np.ndarray:
    """Labels of the first rows from the heads; all others get some, on which the heads agree."""
    asked = head_labels(heads, x[torch.arange(min(ASKED, len(x)))])
    labels = np.empty((len(asked), len(x)), dtype=asked.dtype)
    labels[:] = np.arange(len(x)) % heads.gain.shape[1]
    labels[:, : asked.shape[1]] = asked
    return labels


def train_cut(folder: str, images: int, kind: str, steps: int, place: str) -> dict:
    """An epoch of so many steps: its images per second, bytes read and memory."""
    drawn, step = temi.training.draw_pairs, temi.state.training_step
    clock, read = [], []

    def timed(*arguments):
        clock.append(time.perf_counter())
        read.append(bytes_read())
        return step(*arguments)

    temi.training.draw_pairs = lambda *arguments: drawn(*arguments)[:steps]
    temi.state.training_step = timed
    temi.state.head_labels = cut_labels
    config = temi.TrainConfig(
        num_clusters=CLUSTERS, epochs=1, warmup_epochs=0, batch_size=BATCH, group_size=GROUP,
        device="cpu", precision="fp32",
    )  # fmt: skip
    forget(folder)
    start = time.perf_counter()
    with AnonymousPeak() as memory:
        run_dir = Path(folder) / f"run-{kind}-{place}"
        run = temi.train(
            opened(folder, f"{images}"), config, neighbors=opened(folder, f"{kind}-{images}"),
            run_dir=run_dir, overwrite=True, keep_rows=place, progress=False,
        )  # fmt: skip
    whole = time.perf_counter() - start
    shutil.rmtree(run_dir)
    return {
        "images": images,
        "neighbors": kind,
        "keep_rows": place,
        "steps": steps,
        "images_per_s": BATCH * (steps - 1) / (clock[-1] - clock[0]),
        "read_mb_per_step": (read[-1] - read[0]) / (steps - 1) / 1e6,
        "anonymous_peak_gb": memory.peak * 2**30 / 1e9,
        "epoch_seconds": run.seconds["training"],
        "whole_seconds": whole,
    }


def reading(folder: str, images: int) -> dict:
    """Bytes and seconds of what a step reads, without anything computed from it."""
    shape = opened(folder, f"{images}")[:1]
    block, size_of_row = rows.rows_per_block(shape), shape[0].nbytes
    del shape  # pages that are mapped cannot be forgotten
    steps = rows.WINDOW * block // BATCH  # of one window
    found: dict = {"row_bytes": size_of_row, "page_bytes": mmap.PAGESIZE, "block_rows": block}

    def measure(name: str, batches: np.ndarray, read) -> None:
        forget(folder)
        x = opened(folder, f"{images}")
        before, clock = bytes_read(), time.perf_counter()
        for batch in batches:
            read(x, batch)
        seconds, size = time.perf_counter() - clock, bytes_read() - before
        found[name] = {
            "mb_per_step": size / len(batches) / 1e6,
            "times_the_rows": size / (batches.size * size_of_row),
            "ms_per_step": seconds / len(batches) * 1e3,
        }
        print(name, found[name], flush=True)

    def asked(x, batch, block=1):
        rows.ask_for(x, batch, block)
        return x[batch]

    for kind in ("random", "clustered"):
        generator = torch.Generator().manual_seed(0)
        near = opened(folder, f"{kind}-{images}")
        pairs = temi.training.draw_pairs(near, BATCH, generator, GROUP, block)[:steps].numpy()
        anchors, others = pairs[:, :BATCH], pairs[:, BATCH:]
        if kind == "random":
            measure("anchors, in blocks", anchors, lambda x, batch: asked(x, batch, block))
            anywhere = np.random.default_rng(0).integers(images, size=(200, BATCH))
            measure("anchors, anywhere", anywhere, asked)
            measure("neighbours, random, touched only", others[:5], lambda x, batch: x[batch])
            others = others[:200]
        measure(f"neighbours, {kind}", others, asked)

        def prepared(x, batch):
            mean = np.zeros(DIM, np.float32)
            source = rows.prepared_rows(x, "l2", mean, None, rows.CPU, "file", block, GROUP)
            return source[torch.from_numpy(batch)]

        measure(f"both, prepared, {kind}", pairs[: len(others)], prepared)
    found["blocks_mb_per_s"] = {}
    for size in (2**power for power in range(12, 20)):
        count = size // size_of_row
        chosen = np.random.default_rng(0).permutation(images // count)[: 2**26 // size]
        forget(folder)
        x = opened(folder, f"{images}")
        clock = time.perf_counter()
        for some in np.array_split(chosen * count, max(1, len(chosen) // 128)):
            rows.ask_for(x, some, count)
            x[(some[:, None] + np.arange(count)).ravel()]
        found["blocks_mb_per_s"][size] = len(chosen) * size / (time.perf_counter() - clock) / 1e6
        del x
    return found


def quality(features: str | None, seeds: int) -> dict:
    """Scores with anchors in full order and in blocks, of embeddings sorted by class."""
    if features is None:
        images = temi.load_images("digits")
        x, y = temi.embed(images, progress=False).x, images.labels
    else:
        loaded = np.load(features)
        x, y = loaded["X"], loaded["y"]
    order = np.argsort(y, kind="stable")
    x, y = np.ascontiguousarray(x[order]), y[order]
    classes = len(np.unique(y))
    few = max(2, len(y) // classes // 4)  # rows: four blocks a class
    small = rows.rows_per_block(x)
    orders = {
        "full": (None, None),
        "blocks, an eighth of the file in a window": (small, max(2, len(x) // small // 8)),
        "two fifths of the classes in a window": (few, classes // 2),
    }
    on_cpu = {"device": "cpu", "precision": "fp32"}
    config = temi.TrainConfig(num_clusters=classes, **on_cpu)
    data = temi.embeddings.Features.from_array(x)
    resolved = config.resolve(len(x))
    width = resolved.num_neighbors
    mean = temi.embeddings.mean_embedding(x, config.normalize)
    axes = temi.embeddings.principal_axes(x, mean, config.pca_dim)
    prepared = torch.from_numpy(temi.embeddings.normalize(x, config.normalize, mean, axes))
    near = temi.nearest_neighbors(prepared, width)[0].numpy()
    found: dict = {"features": Path(features).name if features else "digits", "images": len(x),
                   "classes": classes, "epochs": resolved.epochs, "seeds": seeds}  # fmt: skip
    window, rows_in_block = rows.WINDOW, temi.training.rows_per_block
    scores: dict = {name: [] for name in orders}
    for seed in range(seeds):
        for name, (block, mixed) in orders.items():
            config = temi.TrainConfig(num_clusters=classes, seed=seed, **on_cpu)
            rows.WINDOW = mixed or window
            temi.training.rows_per_block = lambda _, block=block: block
            place = "device" if block is None else "file"
            run = temi.train(data, config, neighbors=near, keep_rows=place, progress=False)
            scores[name].append(temi.evaluate(run.labels, y))
            print(name, seed, scores[name][-1], flush=True)
    for name, (block, mixed) in orders.items():
        found[name] = {"block_rows": block, "window_blocks": mixed}
        for key in ("acc", "nmi"):
            each = [float(score[key]) for score in scores[name]]
            found[name][key] = {"mean": np.mean(each), "sd": np.std(each, ddof=1), "each": each}
    rows.WINDOW, temi.training.rows_per_block = window, rows_in_block
    return found


def trainings(folder: str, images: int, fewer: int, steps: int, limit: int) -> list[dict]:
    found = []
    for count, kind, most, place in (
        (images, "random", limit, "auto"),
        (images, "clustered", limit, "auto"),
        (fewer, "random", 2**40, "device"),
        (fewer, "random", 2**40, "file"),
    ):
        with control_group(most) as group:
            measured = alone(train_cut, folder, count, kind, steps, place)
            says = {} if group is None else {"limit_gb": most / 1e9} | group_says(group)
        found.append(measured | says)
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="for the files; None: a temporary one")
    parser.add_argument("--features", help=".npz with X and y, for the quality")
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--limit", type=float, default=3.0, help="GB")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=["training", "reading", "quality"])
    options = parser.parse_args()
    images, fewer = options.images, min(options.images, IN_MEMORY)
    results: dict = {}
    if options.only and FILE.exists():  # the other parts stay
        results = json.loads(FILE.read_text())
    if options.only in (None, "training", "reading"):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            for count in {images, fewer}:
                alone(make, folder, count)
            if options.only != "training":
                results["reading"] = alone(reading, folder, images)
            if options.only != "reading":
                limit = int(options.limit * 1e9)
                results["training"] = trainings(folder, images, fewer, options.steps, limit)
    if options.only in (None, "quality"):
        results["quality"] = alone(quality, options.features, options.seeds)
        print(results["quality"], flush=True)
    conditions = {
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "kernel": platform.release(),
        "disk": disk(options.folder or tempfile.gettempdir()), "python": platform.python_version(),
        "torch": torch.__version__, "numpy": np.__version__,
    }  # fmt: skip
    measured = (options.only,) if options.only else ("reading", "training", "quality")
    results["conditions"] = results.get("conditions", {}) | dict.fromkeys(measured, conditions)
    write_json(FILE, results)


def disk(folder: str) -> dict:
    """What the system says of the disk of a folder: its name, and KB that it reads ahead."""
    number = os.stat(folder).st_dev
    queue = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    ahead = next((place / "queue/read_ahead_kb" for place in (queue, queue.parent)
                  if (place / "queue/read_ahead_kb").exists()), None)  # fmt: skip
    return {"name": queue.name, "read_ahead_kb": int(ahead.read_text()) if ahead else None}


if __name__ == "__main__":
    main()
