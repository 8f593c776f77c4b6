"""Claim: where classes differ tenfold in size, TEMI is above k-means with a beta of 0.8, not 0.6.

CIFAR-10 (JPEG, EfficientNet-Lite0 at 112 pixels) with class sizes that fall exponentially, the
largest to the smallest 10 and 50 times. A seed draws which classes are large, and which of their
images stay; then, as in ``comparison.py``, the default recipe at each beta, every reading, k-means.
Classes choose the images and score, and do nothing else. The number of clusters is that of the
classes. One row a run and reading in results/unbalanced.csv; what is there is skipped.

    python benchmarks/unbalanced.py --images cifar10-jpeg=PATH-TO-CIFAR10-JPEG/test
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from benchmarks.comparison import complete, load, parser, plan
from temi.embeddings import Features

FILE = Path(__file__).parents[1] / "results" / "unbalanced.csv"
RATIOS = (10, 50)
BETAS = (0.5, 0.6, 0.7, 0.8, 1.0)


def class_sizes(largest: int, classes: int, ratio: float) -> np.ndarray:
    """Images of each class, from the largest to the smallest, each the same share of the last."""
    return np.round(largest * ratio ** (-np.arange(classes) / (classes - 1))).astype(int)


def thinned(features: Features, ratio: float, seed: int) -> Features:
    """A part of the images, in which the classes have the sizes of :func:`class_sizes`."""
    rng, largest = np.random.default_rng(seed), np.bincount(features.labels).min()
    sizes = class_sizes(largest, features.num_classes, ratio)
    drawn = [
        rng.permutation(np.flatnonzero(features.labels == label))[:size]
        for label, size in zip(rng.permutation(features.num_classes), sizes, strict=True)
    ]
    rows = np.sort(np.concatenate(drawn))
    manifest = {"dataset": f"{features.dataset} 1:{ratio}"}
    manifest["sha256"] = hashlib.sha256(np.ascontiguousarray(features.x[rows])).hexdigest()
    return dataclasses.replace(
        features, x=features.x[rows], ids=tuple(features.ids[row] for row in rows),
        labels=features.labels[rows], manifest=features.manifest | manifest,
    )  # fmt: skip


def main() -> None:
    options, runs = parser(__doc__).parse_args(), []
    for features in load(options):
        for seed in range(options.seeds):
            for ratio in RATIOS:
                part = thinned(features, ratio, seed)
                runs.append((part, plan(part, "k-means", seed)))
                runs += [(part, plan(part, "fast", seed, beta=beta)) for beta in BETAS]
    table = complete(FILE, runs)
    groups = table.groupby(["dataset", "method", "beta", "reading"], sort=False, dropna=False)
    print(groups[["acc", "nmi", "ari", "recall", "balance"]].mean().round(3).to_string())


if __name__ == "__main__":
    main()
