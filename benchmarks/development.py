"""Claim: mutual neighbours are ahead of ``fast`` on development data too, if it is photographs.

Development data are those whose labels may choose settings: every other image of the digits; the
first 1,000 training images of each class of CIFAR-10 (JPEG); the first 50 classes of
Tiny-ImageNet-100. Trains ``fast`` on them with other neighbours, other groups or less work
(:data:`VARIANTS`), in fp32, over eight seeds, whose mean is half a point to a point off; for at
most 20 epochs, where it would take 38 of so few digits. A row a run goes to
results/development.csv, as they come; those that are there are skipped.

    python benchmarks/development.py --images cifar10=PATH-TO-CIFAR10-JPEG/train \
        --images tiny100=PATH-TO-TINY-IMAGENET-100 --device cuda --jobs 16

embeds photographs with EfficientNet-Lite0 at 112 pixels (trained with ImageNet's labels): of each
data set the first 1,000 images of each of the first 50 classes. ``--features
NAME/BACKBONE=FILE.npz`` takes embeddings of such parts that are there. The stored rows took two
minutes on an NVIDIA H200; without ``--device`` and ``--jobs`` a run takes half a minute on two
cores.
"""

import dataclasses
import itertools
import math
import time
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import temi
from benchmarks.ablations import named
from benchmarks.beyond import adaptive_neighbors
from benchmarks.comparison import load, parser
from benchmarks.table import has, put
from temi.devices import device_name
from temi.embeddings import Features, normalize
from temi.files import write_whole

FILE = Path(__file__).parents[1] / "results" / "development.csv"
CLASSES, OF_A_CLASS, MOST_EPOCHS = 50, 1000, 20
SIX = {"group_size": 6}
HALF = {"root_share": 0.5}  # neighbours, of the root of a cluster's images
VARIANTS: dict[str, dict] = {
    "fast": {},
    "fewer neighbours": HALF,
    "mutual neighbours": {"mutual_neighbors": True},
    "adaptive neighbours": {},
    "groups of six": SIX,
    "fewer neighbours, groups of six": HALF | SIX,
    "fewer neighbours, groups of six, 32 heads": HALF | SIX | {"num_heads": 32},
    "128 components": {"pca_dim": 128},
    "three quarters of the epochs": {"epoch_share": 0.75},
}
RUN = ["dataset", "variant", "seed"]
COLUMNS = [*RUN, "acc", "nmi", "ari", "seconds", "images", "device"]


def part(images: temi.ImageSet, rows: np.ndarray) -> temi.ImageSet:
    """Some of the images, under a name of their own, so that the cache keeps those of all."""
    kept = images.keep([images.ids[row] for row in rows])
    return dataclasses.replace(kept, name=f"{images.name}-development")


def first_of_each_class(images: temi.ImageSet) -> temi.ImageSet:
    """The first images of each of the first classes."""
    rows = [np.flatnonzero(images.labels == c)[:OF_A_CLASS] for c in range(CLASSES)]
    kept = part(images, np.sort(np.concatenate(rows)))
    return dataclasses.replace(kept, class_names=images.class_names[:CLASSES])


def every_other_digit() -> Features:
    """Embeddings of half of the digits, by pixels."""
    digits = temi.load_images("digits")
    digits = part(digits, np.arange(0, len(digits), 2))
    return named(temi.embed(digits), "digits", "pixels")


def config_of(variant: str, features: Features, seed: int, device: str) -> temi.TrainConfig:
    """Settings of ``fast`` with what the variant changes."""
    given = {"num_clusters": features.num_classes, "seed": seed, "device": device}
    given |= {"precision": "fp32"} | VARIANTS[variant]
    if share := given.pop("root_share", None):
        given["num_neighbors"] = round(share * math.sqrt(len(features) / features.num_classes))
    epochs = temi.TrainConfig(num_clusters=features.num_classes).resolve(len(features)).epochs
    given["epochs"] = round(given.pop("epoch_share", 1) * min(epochs, MOST_EPOCHS))
    return temi.TrainConfig(**given)


def measure(features: Features, row: dict, device: str) -> dict:
    """Train once; the row with its scores."""
    clock = time.perf_counter()
    config, neighbors = config_of(row["variant"], features, row["seed"], device), None
    if row["variant"].startswith("adaptive"):
        k = config.resolve(len(features)).num_neighbors
        x = torch.from_numpy(normalize(features.x, config.normalize)).to(device)
        neighbors = adaptive_neighbors(x, k)
    run = temi.train(features, config, neighbors=neighbors, progress=False)
    found = temi.evaluate(run.labels, features.labels)
    row |= {score: round(found[score], 4) for score in ("acc", "nmi", "ari")}
    row |= {"seconds": round(time.perf_counter() - clock, 1), "images": len(features)}
    return row | {"device": device_name(torch.device(device))}


def main() -> None:
    described = parser(__doc__)
    described.add_argument("--device", default="cpu")
    described.add_argument("--jobs", type=int, default=1, help="runs at a time")
    described.set_defaults(seeds=8)
    options = described.parse_args()
    sets, jobs = [every_other_digit(), *load(options, first_of_each_class)], []
    for seed, features, variant in itertools.product(range(options.seeds), sets, VARIANTS):
        row = {"dataset": features.dataset, "variant": variant, "seed": seed}
        if not has(FILE, row, RUN):
            jobs.append((features, row))
    rows = joblib.Parallel(options.jobs, return_as="generator_unordered")(
        joblib.delayed(measure)(*job, options.device) for job in jobs
    )
    for row in tqdm(rows, total=len(jobs), unit="run"):
        put(FILE, [row], RUN, COLUMNS)
    table = pd.read_csv(FILE).sort_values(RUN)
    write_whole(FILE, table.to_csv(index=False))
    groups = table.groupby(["variant", "dataset"], sort=False)
    print((100 * groups[["acc", "nmi"]].mean()).round(1).unstack().to_string())


if __name__ == "__main__":
    main()
