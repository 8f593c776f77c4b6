"""What each step on the way from the recipe ``paper`` to ``fast`` bought, in points and in seconds.

Starts from ``paper``, cut to four epochs, and takes over one setting of ``fast`` after the other,
so that each row is the one before it and one change more; the last row is ``fast``. Scores are
those of the vote, by labels that choose nothing here. The settings themselves were searched on data
such as this, so the scores are those of development data.

    python benchmarks/speed_steps.py FILE.npz

with embeddings X and classes y; for the stored table, made with ``--seeds 1``, those of the first
1,000 training images of each class of CIFAR-10 (JPEG) by EfficientNet-Lite0 at 112 pixels. Writes
results/speed.csv.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import temi
from temi.config import RECIPES

FILE = Path(__file__).parents[1] / "results" / "speed.csv"
EPOCHS = 4
STEPS = (
    ("the recipe paper, four epochs of it", ()),
    ("learning rate 40 times higher", ("learning_rate",)),
    ("one epoch of warm-up instead of twenty", ("warmup_epochs",)),
    ("teacher that keeps 0.9 of itself, not 0.996", ("teacher_momentum",)),
    ("embeddings centred, length 1", ("normalize",)),
    ("as many neighbours as the root of a cluster's images", ("num_neighbors",)),
    ("batches of 128 instead of 512", ("batch_size",)),
    ("groups of four, every two a pair", ("group_size",)),
    ("256 principal components", ("pca_dim",)),
)


def configs(clusters: int, seed: int) -> dict[str, temi.TrainConfig]:
    """Settings of each row, by what it changes."""
    settings = RECIPES["paper"] | {"epochs": EPOCHS, "pca_dim": 10**6}  # all components
    found = {}
    for name, taken in STEPS:
        settings = settings | {key: RECIPES["fast"].get(key) for key in taken}
        found[name] = temi.TrainConfig(
            num_clusters=clusters, seed=seed, device="cpu", precision="fp32", **settings
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path, help="file with X and y")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    features = temi.load_features(arguments.features)
    x, y = np.asarray(features.x, dtype=np.float32), features.labels
    rows = []
    for seed in range(arguments.seeds):
        for name, config in configs(features.num_classes, seed).items():
            run = temi.train(x, config, progress=False)
            scores = temi.evaluate(run.labels, y)
            seconds = run.seconds["training"] / EPOCHS
            rows.append(
                {"change": name, "seed": seed, "acc": scores["acc"], "nmi": scores["nmi"],
                 "seconds_per_epoch": seconds}
            )  # fmt: skip
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows).round({"acc": 4, "nmi": 4, "seconds_per_epoch": 1})
    table.assign(threads=torch.get_num_threads()).to_csv(FILE, index=False)
    print(table.groupby("change", sort=False).mean().round(3))


if __name__ == "__main__":
    main()
