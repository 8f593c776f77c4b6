"""Claim: images that a run has not seen are clustered as well as those that it was trained on.

Trains on the 10,000 test images of CIFAR-10 (JPEG) with EfficientNet-Lite0 at 112 pixels and lets
the run predict 10,000 others, the first 1,000 training images of each class. Classes score both and
do nothing else. Writes results/benchmarks/new_images.json.

    python benchmarks/new_images.py PATH-TO-CIFAR10-JPEG
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch

import temi
from temi.files import write_json

RESULTS = Path(__file__).parents[1] / "results" / "benchmarks" / "new_images.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    known, new = (
        temi.load_images(parser.parse_args().folder, split=split, labels="folders")
        for split in ("test", "train")
    )
    first = [np.flatnonzero(new.labels == label)[:1000] for label in range(new.num_classes)]
    new = new.keep([new.ids[row] for row in np.concatenate(first)])
    features = temi.embed(known, "efficientnet_lite0", image_size=112, precision="fp32")
    run = temi.train(features, temi.TrainConfig(num_clusters=known.num_classes, precision="fp32"))
    table = temi.predict_images(run, new)
    results = {
        "trained_on": temi.evaluate(run.labels, known.labels),
        "new": temi.evaluate(table["cluster"].to_numpy(), new.labels),
        "outliers": float(table["outlier"].mean()),
        "images": [len(known), len(new)],
        "conditions": {"cores": os.cpu_count(), "torch": torch.__version__, "seed": 0},
    }
    print(results)
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
