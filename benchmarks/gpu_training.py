"""A whole training on a GPU, and where its time goes: the steps, what is before them, the rest.

By ``temi.train`` with ``fast``, of random embeddings as wide as those of ViT-B/14, around as many
centres as there are clusters, from the array in the host's memory on. ``neighbors`` is what comes
before the steps: principal axes, prepared rows, the search. ``rest`` is the CPU's: checks of the
array, and after each epoch the heads' alignment and vote. What is done once in a process was done
by a small training before.

    python benchmarks/gpu_training.py

Writes results/benchmarks/gpu_training.json.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

import temi
from temi.devices import device_name
from temi.files import write_json
from temi.metrics import cluster_accuracy

FILE = Path(__file__).parents[1] / "results" / "benchmarks" / "gpu_training.json"
WIDTH, CHUNK = 768, 2**16  # numbers of an embedding; embeddings made at a time


def groups(images: int, clusters: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Random centres under twice as much noise, in float16; and the centre of each row."""
    torch.manual_seed(0)
    centres = torch.randn(clusters, WIDTH, device=device)
    group = torch.randint(clusters, (images,), device=device)
    x = np.empty((images, WIDTH), dtype=np.float16)
    for start in range(0, images, CHUNK):
        centre = centres[group[start : start + CHUNK]]
        x[start : start + CHUNK] = (centre + 2 * torch.randn_like(centre)).half().cpu().numpy()
    return x, group.cpu().numpy()


def training(images: int, clusters: int, device: torch.device) -> dict:
    """Seconds of a whole training of ``fast``, and of what in it; the groups only score."""
    x, group = groups(images, clusters, device)
    clock = time.perf_counter()
    config = temi.TrainConfig(num_clusters=clusters, device=str(device))
    run = temi.train(x, config, progress=False)
    seconds = {"whole": time.perf_counter() - clock, **run.seconds}
    seconds["rest"] = seconds["whole"] - seconds["neighbors"] - seconds["training"]
    return {"images": images, "clusters": clusters, "epochs": len(run.history),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "acc": round(cluster_accuracy(run.labels, group), 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    training(10_000, 10, device)
    results = {"device": device_name(device), "cores": os.cpu_count(), "torch": torch.__version__}
    results |= training(options.images, options.clusters, device)
    print(results)
    write_json(FILE, results)


if __name__ == "__main__":
    main()
