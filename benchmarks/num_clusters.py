"""Claim: the silhouette suggests 0.3 to 1.5 times as many clusters as there are classes.

Of several data sets, and of parts of them that have fewer classes, the number of clusters that
:func:`temi.suggest_num_clusters` suggests, beside the number of classes, which it does not know.
Also what the stability between halves, the other column of its curve, would suggest. Writes
results/num_clusters.csv.

    python benchmarks/num_clusters.py NAME=FILE.npz …

The digits, pixels as features, need nothing; every other data set is a file of embeddings with X
and y (``temi embed`` and the classes), such as cifar10=FILE.npz.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import temi

FILE = Path(__file__).parents[1] / "results" / "num_clusters.csv"
SEEDS = (0, 1, 2)


def parts(classes: int) -> list[int]:
    """Numbers of classes, the first ones in order, that are tried."""
    return sorted({max(2, round(share * classes)) for share in (0.2, 0.5, 1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="NAME=FILE.npz with X and y")
    digits = temi.load_images("digits")
    sets = {"digits": (digits.images.reshape(len(digits), -1) / 255.0, digits.labels)}
    for given in parser.parse_args().files:
        name, _, file = given.partition("=")
        features = temi.load_features(file)
        sets[name] = (np.asarray(features.x), features.labels)
    rows = []
    for name, (x, y) in sets.items():
        for classes in parts(y.max() + 1):
            of_these = x[y < classes].astype(np.float32)
            for seed in SEEDS:
                found = temi.suggest_num_clusters(of_these, seed=seed, progress=False)
                stablest = found.curve["num_clusters"][found.curve["stability"].argmax()]
                rows.append(
                    {"dataset": name, "images": len(of_these), "classes": classes, "seed": seed,
                     "suggested": found.num_clusters, "by_stability": stablest}
                )  # fmt: skip
                print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(FILE, index=False)


if __name__ == "__main__":
    main()
