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

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans, SpectralClustering

import temi
from benchmarks.ablations import alike, named, pair
from temi.embeddings import Features, mean_embedding, normalize, principal_axes
from temi.files import write_whole

FILE = Path(__file__).parents[1] / "results" / "graph_clustering.csv"
DIMENSIONS = 256  # those that the heads see
RUN = ["dataset", "method", "seed"]  # names a run
SCORES = ["acc", "nmi", "ari"]


def methods(clusters: int, seed: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """From rows [N, D] to clusters [N], by name."""
    graph = {"affinity": "nearest_neighbors", "random_state": seed}
    return {
        "k-means": KMeans(clusters, n_init=10, random_state=seed).fit_predict,
        "Ward": AgglomerativeClustering(clusters).fit_predict,
        "spectral": SpectralClustering(clusters, **graph).fit_predict,
    }


def read() -> pd.DataFrame:
    """The rows that are there."""
    return pd.read_csv(FILE) if FILE.exists() else pd.DataFrame(columns=RUN)


def measure(features: Features, seed: int) -> None:
    """The rows of a data set and seed that are not there yet."""
    mean = mean_embedding(features.x, "center-l2")
    x = normalize(features.x, "center-l2", mean, principal_axes(features.x, mean, DIMENSIONS))
    ways = methods(features.num_classes, seed)
    config = temi.TrainConfig(num_clusters=features.num_classes, seed=seed)
    ways["TEMI"] = lambda _: temi.train(features, config, progress=False).labels
    for name, cluster in ways.items():
        row = {"dataset": features.dataset, "method": name, "seed": seed}
        if alike(read(), row, RUN).any() or (name == "Ward" and seed):
            continue
        clock = time.perf_counter()
        labels = cluster(x)
        row["seconds"] = round(time.perf_counter() - clock, 1)
        found = temi.evaluate(labels, features.labels)
        row |= {score: round(found[score], 4) for score in SCORES}
        row |= {"images": len(features), "threads": torch.get_num_threads()}
        print(row, flush=True)
        table = pd.DataFrame([*read().to_dict("records"), row])
        write_whole(FILE, table.to_csv(index=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=pair, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    sets = [temi.embed(temi.load_images("digits"))]
    for name, folder in options.images:
        images = temi.load_images(folder, labels="folders")
        features = temi.embed(images, "efficientnet_lite0", image_size=112)
        sets.append(named(features, name, "efficientnet_lite0"))
    for features in sets:
        for seed in range(options.seeds):
            measure(features, seed)


if __name__ == "__main__":
    main()
