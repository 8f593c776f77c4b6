"""Claim: the approximate search finds nearly all neighbours of photographs in a part of the time.

Prepares embeddings as the recipe ``fast`` does, looks for the 25 nearest of each row exactly and
approximately, and counts which of the exact ones were found. No label is read. Writes
results/benchmarks/neighbors.json.

    python benchmarks/neighbors.py FILE.npz [FILE.npz ...]

Each file holds embeddings ``X`` [N, D]; the rows of several of the same width are joined.
"""

import argparse
import os
import time
from pathlib import Path

import faiss
import numpy as np
import torch

import temi
from temi.embeddings import mean_embedding, normalize, principal_axes
from temi.files import write_json

FILE = Path(__file__).parents[1] / "results" / "benchmarks" / "neighbors.json"
K = 25


def timed(search, x: torch.Tensor) -> tuple[np.ndarray, float]:
    """Neighbours [N, k] and the seconds they took."""
    clock = time.perf_counter()
    indices, _ = search(x, K)
    return indices.numpy(), round(time.perf_counter() - clock, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    x = np.concatenate([temi.load_features(file).x for file in parser.parse_args().files])
    how, width = temi.RECIPES["fast"]["normalize"], temi.RECIPES["fast"]["pca_dim"]
    mean = mean_embedding(x, how)
    x = torch.from_numpy(normalize(x, how, mean, principal_axes(x, mean, width)))
    exact, exact_seconds = timed(temi.nearest_neighbors, x)
    found, seconds = timed(temi.approximate_neighbors, x)
    ids = np.sort(np.hstack([exact, found]))  # those that both have stand twice
    results = {
        "images": len(x), "dimensions": x.shape[1], "k": K,
        "recall": round(float((np.diff(ids) == 0).sum() / exact.size), 4),
        "exact_seconds": exact_seconds, "approximate_seconds": seconds,
        "conditions": {"cores": os.cpu_count(), "threads": torch.get_num_threads(),
                       "torch": torch.__version__, "faiss": faiss.__version__},
    }  # fmt: skip
    print(results)
    write_json(FILE, results)


if __name__ == "__main__":
    main()
