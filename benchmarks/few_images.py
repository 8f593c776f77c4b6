"""Claim: of few images ``fast`` takes more than 20 epochs to good use.

On as many images, drawn at random from development data (every other one of the digits; the first
1,000 training images of each class of CIFAR-10), with the epochs that the recipe takes by itself,
which are 260 steps here, with 20, and by k-means on centred and L2-normalised embeddings. A seed
draws the images. Classes score and do nothing else; the numbers of clusters are those of the
classes. One row a run in results/few_images.csv; what is there is skipped.

    python benchmarks/few_images.py --images cifar10=PATH-TO-CIFAR10-JPEG/train

takes half an hour on two cores.
"""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

import temi
from benchmarks.ablations import BASE
from benchmarks.comparison import load, parser
from benchmarks.development import every_other_digit, first_of_each_class
from benchmarks.table import has, put
from temi.embeddings import Features

FILE = Path(__file__).parents[1] / "results" / "few_images.csv"
IMAGES = (150, 300, 600)
EPOCHS = {"20 epochs": 20, "260 steps": None}
RUN = ["dataset", "images", "method", "seed"]
COLUMNS = [*RUN, "epochs", "acc", "nmi", "ari"]


def drawn(features: Features, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """So many embeddings, and their classes."""
    rows = np.random.default_rng(seed).choice(len(features), images, replace=False)
    return np.asarray(features.x[rows], dtype=np.float32), features.labels[rows]


def measure(features: Features, row: dict) -> dict:
    """Cluster once; the row with its scores."""
    x, classes = drawn(features, row["images"], row["seed"])
    clusters, epochs = features.num_classes, None
    if row["method"] == "k-means":
        labels = temi.kmeans(x, clusters, "center-l2", row["seed"])
    else:
        config = temi.TrainConfig(
            **BASE, num_clusters=clusters, seed=row["seed"], epochs=EPOCHS[row["method"]]
        )
        run = temi.train(x, config, progress=False)
        labels, epochs = run.labels, run.config.epochs
    found = temi.evaluate(labels, classes)
    scores = {name: round(found[name], 4) for name in COLUMNS[-3:]}
    return row | {"epochs": epochs} | scores


def main() -> None:
    described = parser(__doc__)
    described.set_defaults(seeds=6)
    options = described.parse_args()
    sets, jobs = [every_other_digit(), *load(options, first_of_each_class)], []
    methods = ("k-means", *EPOCHS)
    for seed, features, images, method in itertools.product(
        range(options.seeds), sets, IMAGES, methods
    ):
        row = {"dataset": features.dataset, "images": images, "method": method, "seed": seed}
        if not has(FILE, row, RUN):
            jobs.append((features, row))
    for features, row in tqdm(jobs, unit="run"):
        put(FILE, [measure(features, row)], RUN, COLUMNS)
    groups = pd.read_csv(FILE).groupby(["dataset", "images", "method"], sort=False)
    print(groups[["acc", "nmi"]].agg(["mean", "std"]).round(3).to_string())


if __name__ == "__main__":
    main()
