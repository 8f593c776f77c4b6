"""Claim: on photographs the features of a network have far purer neighbours than pixels do.

Embeds the 10,000 test images of CIFAR-10 (JPEG) as pixels and with EfficientNet-Lite0 at 112 px,
finds each image's nearest neighbours, and counts how many of the k nearest share the class (labels
only check). Writes results/cifar10_purity.csv and two sheets of pictures for the chapters.

    python benchmarks/cifar10_features.py PATH-TO-CIFAR10-JPEG/test
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import temi
from temi import plots
from temi.embeddings import normalize

RESULTS = Path(__file__).parents[1] / "results"
SPACES = {"pixels": None, "efficientnet_lite0": 112}  # backbone -> image_size
KS = (1, 2, 5, 10, 20, 50, 100, 200)
SHOWN = (7, 1234, 2345, 3456, 4567, 5678, 6789, 7890, 8901, 9950)  # one image of each class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    images = temi.load_images(parser.parse_args().folder, labels="folders")
    plots.use_style()
    by_class = [np.flatnonzero(images.labels == c)[:16] for c in range(images.num_classes)]
    save(plots.image_rows(images.images, by_class, images.class_names), "cifar10_classes.jpg")
    purity, nearest = {}, {}
    for backbone, size in SPACES.items():
        features = temi.embed(images, backbone, image_size=size, precision="fp32")
        x = torch.from_numpy(normalize(features.x, "center-l2"))
        neighbors = temi.nearest_neighbors(x, max(KS))[0].numpy()  # (N, k)
        shares = images.labels[neighbors] == images.labels[:, None]
        purity[backbone] = [round(float(shares[:, :k].mean()), 4) for k in KS]
        nearest[backbone] = neighbors
    rows, titles = [], []
    for index in SHOWN:
        for backbone, neighbors in nearest.items():
            rows.append([index, *neighbors[index, :12]])
            titles.append(backbone.removeprefix("efficientnet_"))
    save(plots.image_rows(images.images, rows, titles), "cifar10_neighbors.jpg")
    table = pd.DataFrame(purity, index=pd.Index(KS, name="k"))
    table.to_csv(RESULTS / "cifar10_purity.csv")
    print(table)


def save(figure, name: str) -> None:
    figure.savefig(RESULTS / "figures" / name, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    main()
