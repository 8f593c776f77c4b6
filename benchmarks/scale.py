"""Claim: a training of 1.28 million images and 1,000 clusters fits into 3 GB.

Measured with random embeddings, of which only the sizes matter:

* the time of a step for 10,000 to a million images, which should not depend on their number;
* the time of the neighbour search for 10,000 and 100,000 images, and what it comes to for 1.28
  million, as it grows with the square of their number;
* the peak of anonymous resident memory (RssAnon: what cannot be dropped and read again from a file)
  of :func:`temi.train` on 1.28M x 768 embeddings in float16, at 1,000 clusters, with the neighbours
  given, both mapped from files, and an epoch cut to some steps, everything after it included.

What comes after a training, alignment, vote and scores, is measured by ``large_scores.py``.
Linux alone, for /proc; 6 GB of memory and 2 GB of disk are needed.

    python benchmarks/scale.py

Writes results/benchmarks/scale.json.
"""

import argparse
import multiprocessing
import os
import re
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

import temi
import temi.training
from temi.embeddings import Features
from temi.files import write_json
from temi.neighbors import nearest_neighbors

FILE = Path(__file__).parents[1] / "results" / "benchmarks" / "scale.json"
IMAGES, DIM, CLUSTERS, HEADS = 1_280_000, 768, 1000, 16
NEIGHBORS, STEPS = 36, 20


class AnonymousPeak:
    """The largest RssAnon of this process within the context, in GB, above nothing."""

    def __enter__(self) -> "AnonymousPeak":
        self.peak, self.over = 0.0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.02):
            status = Path("/proc/self/status").read_text()
            now = int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 2**20
            self.peak = max(self.peak, now)

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()


def random_features(folder: str, images: int, dim: int) -> tuple[Features, np.ndarray]:
    """Embeddings in float16 and neighbours in int32, both mapped from files."""
    file = Path(folder) / f"{images}.npy"
    x = np.lib.format.open_memmap(file, "w+", np.float16, (images, dim))
    random = np.random.default_rng(0)
    for start in range(0, images, 65536):
        rows = x[start : start + 65536]
        rows[:] = random.standard_normal(rows.shape, dtype=np.float32)
    x.flush()
    del x
    others = random.integers(1, images, (images, NEIGHBORS), dtype=np.int32)
    others += np.arange(images, dtype=np.int32)[:, None]
    np.save(near := file.with_suffix(".near.npy"), others % images)  # none is its own neighbour
    manifest = {"dataset": "random", "backbone": "own"}
    features = Features(np.load(file, mmap_mode="r"), range(images), manifest)
    return features, np.load(near, mmap_mode="r")


def train_cut(features: Features, neighbors: np.ndarray, clusters: int, steps: int) -> dict:
    """An epoch of so many steps: its seconds, and GB at the peak."""
    drawn = temi.training.draw_pairs
    temi.training.draw_pairs = lambda *arguments: drawn(*arguments)[:steps]
    try:
        with AnonymousPeak() as memory:
            config = temi.TrainConfig(
                num_clusters=clusters, num_heads=HEADS, epochs=1, warmup_epochs=0,
                device="cpu", precision="fp32",
            )  # fmt: skip
            run = temi.train(features, config, neighbors=neighbors, progress=False)
    finally:
        temi.training.draw_pairs = drawn
    return {"steps": steps, "seconds": run.seconds["training"], "peak_gb": memory.peak}


def search_seconds(images: int, dim: int) -> float:
    x = torch.randn(images, dim)
    clock = time.perf_counter()
    nearest_neighbors(x, 25)
    return time.perf_counter() - clock


def alone(work, *arguments):
    """The work's result, from a process of its own, so that no memory of another is counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def training(images: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return train_cut(*random_features(folder, images, DIM), CLUSTERS, STEPS)


def step_seconds(images: int) -> float:
    """Seconds of a step, without what an epoch costs once."""
    with tempfile.TemporaryDirectory() as folder:
        given = random_features(folder, images, 256)
        few, many = (train_cut(*given, 100, steps)["seconds"] for steps in (10, 70))
    return (many - few) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES)
    images = parser.parse_args().images
    results = {"images": images, "dimensions": DIM, "clusters": CLUSTERS, "heads": HEADS}
    for name, measured in (
        ("training", lambda: alone(training, images)),
        ("step_seconds", lambda: {n: alone(step_seconds, n) for n in (10**4, 10**5, 10**6)}),
        ("search_seconds", lambda: {n: alone(search_seconds, n, 256) for n in (10**4, 10**5)}),
    ):
        results[name] = measured()
        print(name, results[name], flush=True)
    pairs = (images / 10**5) ** 2
    results["search_hours_extrapolated"] = results["search_seconds"][10**5] * pairs / 3600
    results["conditions"] = {"cores": os.cpu_count(), "threads": torch.get_num_threads(),
                             "torch": torch.__version__, "numpy": np.__version__}  # fmt: skip
    write_json(FILE, results)


if __name__ == "__main__":
    main()
