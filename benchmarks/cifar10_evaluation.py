"""Claim: the surest half of the images of CIFAR-10 (JPEG) is right more often than the other half.

What the evaluation chapter shows of CIFAR-10, with EfficientNet-Lite0 at 112 pixels (trained with
ImageNet's labels) and seed 0 of the default recipe. Found without labels: the clusters of the
10,000 test images under every head, and under k-means (centred + L2); twenty clusters of the same
images; and the clusters that a run on the first 1,000 training images of each class predicts for
the test images. Found with all labels, as an upper reference: a linear classifier (logistic
regression, its penalty cross-validated) trained on the same training images. All as labels in
results/cifar10_labels.npz, for the chapter to score, and as sheets of pictures.

    python benchmarks/cifar10_evaluation.py PATH-TO-CIFAR10-JPEG

``--features TEST.npz TRAIN.npz`` takes embeddings of these images that are there (``X`` [N, D]).
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

import temi
from benchmarks.ablations import BASE
from benchmarks.cifar10_features import save
from temi import plots
from temi.data import ImageSet
from temi.embeddings import Features, mean_embedding, normalize

FILE = Path(__file__).parents[1] / "results" / "cifar10_labels.npz"
PER_CLASS = 1000  # training images
PER_ROW = 16


def load(folder: str, files: list[Path] | None) -> tuple[ImageSet, Features, Features]:
    """The test images, their embeddings, and those of the training images."""
    test, train = (
        temi.load_images(folder, split=split, labels="folders") for split in ("test", "train")
    )
    rows = [np.flatnonzero(train.labels == c)[:PER_CLASS] for c in range(train.num_classes)]
    train = train.keep([train.ids[row] for row in np.concatenate(rows)])
    if not files:
        embedded = [temi.embed(each, "efficientnet_lite0", image_size=112, precision="fp32")
                    for each in (test, train)]  # fmt: skip
        return test, *embedded
    found = [temi.load_features(file) for file in files]
    return test, *(
        dataclasses.replace(each, labels=images.labels, class_names=images.class_names)
        for each, images in zip(found, (test, train), strict=True)
    )


def fit(features: Features, clusters: int) -> temi.Run:
    config = temi.TrainConfig(**BASE, num_clusters=clusters)
    return temi.train(features, config, progress=False)


def linear_probe(train: Features, test: Features) -> np.ndarray:
    """Classes [N] that a linear classifier gives the test images, after all training labels."""
    mean = mean_embedding(train.x, "center-l2")
    x, new = (normalize(each.x, "center-l2", mean) for each in (train, test))
    grid = {"C": [0.1, 1, 10]}
    probe = GridSearchCV(LogisticRegression(max_iter=500), grid, cv=3).fit(x, train.labels)
    print("linear probe", probe.best_params_, f"cross-validated {probe.best_score_:.4f}")
    return probe.predict(new)


def certainty(run: temi.Run, features: Features) -> np.ndarray:
    """Mean probability [N] that the heads give each image's cluster: finer than their agreement."""
    return run.predict_proba(features)[np.arange(len(features)), run.labels]


def sheets(images: ImageSet, labels: np.ndarray, sure: np.ndarray) -> None:
    """Pictures of the surest and of the least sure images of each cluster."""
    members = [plots.surest_first(labels, sure, c) for c in np.unique(labels)]
    shown = {"surest": [rows[:PER_ROW] for rows in members],
             "unsure": [rows[: -PER_ROW - 1 : -1] for rows in members]}  # fmt: skip
    for name, rows in shown.items():
        titles = [f"{c}  ({sure[row].mean():.0%})" for c, row in enumerate(rows)]
        save(plots.image_rows(images.images, rows, titles), f"cifar10_{name}.jpg")


def finer_sheet(images: ImageSet, labels: np.ndarray, sure: np.ndarray) -> None:
    """Pictures of twice as many clusters, those of one class (the labels' only use) together."""
    counts = pd.crosstab(labels, images.labels)
    order = counts.idxmax(axis=1).sort_values(kind="stable").index
    rows = [plots.surest_first(labels, sure, c)[: PER_ROW - 4] for c in order]
    titles = [f"{images.class_names[counts.loc[c].idxmax()]}  {c}" for c in order]
    save(plots.image_rows(images.images, rows, titles), "cifar10_20_clusters.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--features", nargs=2, type=Path, metavar=("TEST", "TRAIN"))
    options = parser.parse_args()
    images, test, train = load(options.folder, options.features)
    classes = images.num_classes
    found = {"classes": images.labels, "class_names": np.array(images.class_names)}
    run = fit(test, classes)
    found |= {"heads": run.head_labels, "best_head": run.best_head, "losses": run.head_losses}
    found["sure"] = certainty(run, test)
    finer = fit(test, 2 * classes)
    found |= {"finer": finer.labels, "finer_sure": certainty(finer, test)}
    found |= {
        "kmeans": temi.kmeans(test.x, classes),
        "finer_kmeans": temi.kmeans(test.x, 2 * classes),
    }
    other = fit(train, classes)
    found |= {"train_classes": train.labels, "train": other.labels, "held_out": other.predict(test)}
    found["probe"] = linear_probe(train, test)
    types = {"i": np.int8, "f": np.float16}  # enough for 20 clusters, and for shares
    small = {name: np.asarray(values) for name, values in found.items()}
    small = {name: v.astype(types.get(v.dtype.kind, v.dtype)) for name, v in small.items()}
    np.savez_compressed(FILE, **small)
    plots.use_style()
    sheets(images, run.labels, found["sure"])
    finer_sheet(images, finer.labels, found["finer_sure"])
    print("vote", temi.evaluate(run.labels, images.labels))
    for name in ("kmeans", "held_out", "probe"):
        print(name, temi.evaluate(found[name], images.labels))


if __name__ == "__main__":
    main()
