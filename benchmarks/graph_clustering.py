"""Claim: spectral clustering of neighbours finds ten classes as well as TEMI does, not a hundred.

TEMI learns from a graph of nearest neighbours; spectral clustering cuts one. Both, beside k-means
and Ward's hierarchical clustering, on the same embeddings, centred and scaled to length 1, of up to
256 principal components: scikit-learn's defaults (10 neighbours, and 10 starts of k-means) but for
the number of clusters, which is that of the classes. Classes score and do nothing else. One row a
run in results/graph_clustering.csv, written as they come; rows that are there are skipped.

    export OMP_NUM_THREADS=1
    python benchmarks/graph_clustering.py --images cifar10-jpeg=PATH-TO-CIFAR10-JPEG/test
    python benchmarks/graph_clustering.py --images tiny100=PATH-TO-TINY-IMAGENET-100 --seeds 1

The digits are always among the data; ``--images NAME=FOLDER`` adds a folder with a sub-folder for
each class, as EfficientNet-Lite0 (trained with ImageNet's labels) sees it at 112 pixels. Ward's
clustering draws nothing at random, and has one row; its memory grows with the square of the images.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering, SpectralClustering

import temi
from benchmarks.ablations import BASE
from benchmarks.comparison import load, parser
from benchmarks.table import has, put
from temi.embeddings import Features, mean_embedding, normalize, principal_axes

FILE = Path(__file__).parents[1] / "results" / "graph_clustering.csv"
DIMENSIONS = 256  # those that the heads see
RUN = ["dataset", "method", "seed"]  # names a run
SCORES = ["acc", "nmi", "ari"]
COLUMNS = [*RUN, "seconds", *SCORES, "images", "threads"]


def methods(features: Features, x: np.ndarray, seed: int) -> dict[str, Callable[[], np.ndarray]]:
    """What gives clusters [N] of the prepared rows ``x`` [N, D], by name; TEMI prepares its own."""
    clusters = features.num_classes
    graph = {"affinity": "nearest_neighbors", "random_state": seed}
    config = temi.TrainConfig(**BASE, num_clusters=clusters, seed=seed)
    return {
        "k-means": lambda: temi.kmeans(x, clusters, "none", seed),
        "Ward": lambda: AgglomerativeClustering(clusters).fit_predict(x),
        "spectral": lambda: SpectralClustering(clusters, **graph).fit_predict(x),
        "TEMI": lambda: temi.train(features, config, progress=False).labels,
    }


def measure(features: Features, seeds: int) -> None:
    """The rows of a data set that are not there yet."""
    mean = mean_embedding(features.x, "center-l2")
    x = normalize(features.x, "center-l2", mean, principal_axes(features.x, mean, DIMENSIONS))
    for seed in range(seeds):
        for name, cluster in methods(features, x, seed).items():
            row = {"dataset": features.dataset, "method": name, "seed": seed}
            if has(FILE, row, RUN) or (name == "Ward" and seed):
                continue
            clock = time.perf_counter()
            labels = cluster()
            row["seconds"] = round(time.perf_counter() - clock, 1)
            found = temi.evaluate(labels, features.labels)
            row |= {score: round(found[score], 4) for score in SCORES}
            row |= {"images": len(features), "threads": torch.get_num_threads()}
            print(row, flush=True)
            put(FILE, [row], RUN, COLUMNS)


def main() -> None:
    options = parser(__doc__).parse_args()
    for features in (temi.embed(temi.load_images("digits")), *load(options)):
        measure(features, options.seeds)


if __name__ == "__main__":
    main()
