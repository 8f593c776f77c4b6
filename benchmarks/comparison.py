"""Claim: on CIFAR-10 (JPEG) the vote of the heads is above their mean, and above k-means.

Trains the default recipe once a seed and scores four readings of its heads: their mean, the head of
the lowest loss (which the paper's authors report), the vote and the soft consensus. K-means on the
same embeddings stands beside it, raw and centred + L2. Classes score and do nothing else. One row a
run and reading in results/comparison.csv, written as they come; runs that are there, with the same
settings and embeddings, are skipped.

    python benchmarks/comparison.py --images cifar10-jpeg=PATH-TO-CIFAR10-JPEG/test \
        --images tiny-imagenet-100=PATH-TO-TINY-IMAGENET-100

embeds folders of images, one sub-folder a class, with EfficientNet-Lite0 at 112 pixels (trained
with ImageNet's labels); ``--features NAME/BACKBONE=FILE.npz`` takes embeddings that are there,
``X`` [N, D] and the classes ``y`` [N]. ``--methods paper`` adds the authors' recipe: 100 epochs,
some twenty minutes a seed on two cores for the 10,000 images of CIFAR-10.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

import temi
from benchmarks.ablations import BASE, named, pair
from benchmarks.table import has, put
from temi.embeddings import Features
from temi.metrics import SCORES
from temi.results import run_settings
from temi.trouble import DivergenceError

FILE = Path(__file__).parents[1] / "results" / "comparison.csv"
KMEANS = {"raw": "none", "centred + L2": "center-l2"}
METHODS = ("k-means", "fast", "paper")
RUN = ["dataset", "method", "beta", "seed"]  # names a run
KEY = ["fingerprint", "settings"]  # what it depends on
COLUMNS = [*RUN, "reading", *SCORES, "recall", "balance", "failed", *KEY]


def readings(run: temi.Run, features: Features) -> dict[str, np.ndarray]:
    """Ways to read the heads: of each the clusterings [M, N] whose mean score counts."""
    return {
        "mean head": run.head_labels,
        "lowest-loss head": run.head_labels[[run.best_head]],
        "vote": run.labels[None],
        "soft consensus": run.soft_consensus(features)[0][None],
    }


def scores(clusterings: np.ndarray, features: Features) -> dict[str, float]:
    """Mean scores of clusterings [M, N]: the four, mean recall of the classes, and balance."""
    classes, clusters = features.labels, features.num_classes
    rows = [
        temi.evaluate(labels, classes)
        | {"recall": temi.class_recall(labels, classes).mean()}
        | {"balance": temi.cluster_statistics(labels, clusters)["balance"]}
        for labels in clusterings
    ]
    return pd.DataFrame(rows).mean().round(4).to_dict()


def plan(features: Features, method: str, seed: int, **changes) -> dict:
    """A run's row without its scores."""
    settings = {"num_clusters": features.num_classes}
    if method != "k-means":
        config = temi.TrainConfig(**BASE, **settings, recipe=method, seed=seed, **changes)
        settings = run_settings(features.dataset, features.backbone, config.resolve(len(features)))
        del settings["device"]
    row = {"dataset": features.dataset, "method": method, "beta": settings.get("beta", "")}
    row |= {"seed": seed, "fingerprint": features.manifest["sha256"][:12]}
    return row | {"settings": json.dumps(settings, separators=(",", ":"))}


def measure(features: Features, row: dict) -> list[dict]:
    """The rows of a run, one a reading; one without scores if its clusters collapsed."""
    settings, seed = json.loads(row["settings"]), row["seed"]
    if row["method"] == "k-means":
        found = {name: temi.kmeans(features.x, settings["num_clusters"], how, seed)[None]
                 for name, how in KMEANS.items()}  # fmt: skip
    else:
        names = set(settings) - {"dataset", "backbone"}
        config = temi.TrainConfig(device="cpu", **{name: settings[name] for name in names})
        try:
            found = readings(temi.train(features, config, progress=False), features)
        except DivergenceError as error:
            return [row | {"failed": str(error)}]
    return [row | {"reading": name} | scores(labels, features) for name, labels in found.items()]


def complete(file: Path, runs: list[tuple[Features, dict]]) -> pd.DataFrame:
    """Do the runs that the table lacks, and write it after each; returns it."""
    for features, row in runs:
        if has(file, row, RUN + KEY):
            continue
        rows = measure(features, row)
        shown = pd.DataFrame(rows, columns=COLUMNS)[[*RUN, "reading", *SCORES, "recall", "failed"]]
        print(shown.to_string(), flush=True)
        put(file, rows, RUN, COLUMNS)
    return pd.read_csv(file)


def load(
    options: argparse.Namespace, part: Callable[[temi.ImageSet], temi.ImageSet] = lambda all_: all_
) -> list[Features]:
    """Embeddings of each data set, of folders those of the ``part`` that is taken of each."""
    sets = []
    for name, file in options.features:
        dataset, _, backbone = name.partition("/")
        sets.append(named(temi.load_features(file), dataset, backbone or "own"))
    for name, folder in options.images:
        images = part(temi.load_images(folder, labels="folders"))
        features = temi.embed(images, "efficientnet_lite0", image_size=112, precision="fp32")
        sets.append(named(features, name, "efficientnet_lite0"))
    return sets


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    source = {"type": pair, "action": "append", "default": []}
    parser.add_argument("--features", **source, metavar="NAME/BACKBONE=FILE", help=".npz, X and y")
    parser.add_argument("--images", **source, metavar="NAME=FOLDER", help="of a folder each class")
    parser.add_argument("--seeds", type=int, default=3)
    return parser


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:2])
    options = options.parse_args()
    sets = load(options)
    runs = [(features, plan(features, method, seed))
            for seed in range(options.seeds) for features in sets
            for method in options.methods]  # fmt: skip
    table = complete(FILE, runs)
    groups = table.groupby(["dataset", "method", "reading"], sort=False)
    print(groups[[*SCORES]].agg(["mean", "std", "count"]).round(3).to_string())


if __name__ == "__main__":
    main()
