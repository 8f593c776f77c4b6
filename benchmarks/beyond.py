"""Claim: of what others add to TEMI, mutual neighbours better the clusters of photographs.

Each addition alone, on top of the recipe ``fast``, over seeds (:data:`VARIANTS`): half as many
neighbours, mutual ones (the recipe ``best``), both, adaptive ones, balanced assignments (Sinkhorn),
a cross-entropy term, the mean embedding of an image and its mirror image, embeddings of two sizes
joined (and the last with mutual neighbours); what TEMI is without its pair weight; of the run of
``fast`` itself, a linear classifier that learns the images on which three of four heads agree and
is asked for all. K-means (centred + L2) stands beside it, of one size and two.
Reported for such or similar additions is 89% on CIFAR-100 (arXiv 2511.16213).

    python benchmarks/beyond.py --images cifar10-jpeg=PATH-TO-CIFAR10-JPEG/test --precision bf16
    python benchmarks/beyond.py --images tiny100=PATH-TO-TINY-IMAGENET-100 --precision bf16 \
        --seeds 2

Embeds with EfficientNet-Lite0 (trained with ImageNet's labels) at 112 pixels, and at 144 too where
two sizes are joined. Classes score and do nothing else. No class is read for ``information``,
mutual information between the found labels of an image and of its ten nearest, over log K, and
``silhouette``: both are of the embeddings of ``fast``, so that they compare. A row a run in
results/beyond.csv, written as they come; those that are there are skipped, those of another
``--precision`` replaced. bf16 is twice as fast as the default fp32 where the processor has it.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import temi
from benchmarks.ablations import pair
from benchmarks.table import has, put
from temi import losses
from temi.embeddings import Features, normalize
from temi.image_files import ImageFiles

FILE = Path(__file__).parents[1] / "results" / "beyond.csv"
BACKBONE, LARGER = "efficientnet_lite0@112", "efficientnet_lite0@144"
AGREED = 0.75  # of the heads, about the images that the classifier learns
VARIANTS = ("fast", "fewer neighbours", "mutual neighbours", "fewer, mutual neighbours",
            "adaptive neighbours", "no pair weight", "balanced assignments", "cross-entropy",
            "mirror image",
            "two sizes", "two sizes, mutual neighbours",
            "k-means", "k-means, two sizes")  # fmt: skip
CLASSIFIER = "classifier"
RUN = ["dataset", "variant", "seed"]  # names a run
COLUMNS = [*RUN, "acc", "nmi", "ari", "information", "silhouette",
           "agreement", "seconds", "precision"]  # fmt: skip


class Mirrored(ImageFiles):
    """Images, each with left and right exchanged."""

    def __getitem__(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(super().__getitem__(index)[:, ::-1])


def adaptive_neighbors(x: Tensor, k: int) -> np.ndarray:
    """Neighbours [N, 4k] above one similarity for all images, k of an image on average.

    An image in a crowd has many, one by itself few, but three at least. Shorter lists are repeated.
    """
    near, similarity = temi.nearest_neighbors(x, 4 * k)
    least = similarity.flatten().kthvalue(len(x) * 3 * k).values
    counts = (similarity >= least).sum(dim=1, keepdim=True).clamp_min(3)
    return near.gather(1, torch.arange(4 * k, device=near.device) % counts).cpu().numpy()


def unweighted(*tensors: Tensor, **settings):
    """TEMI's loss in which every pair counts alike."""
    with patch("temi.losses.pair_weights", lambda p, _: torch.ones_like(p[..., 0])):
        return losses.temi_loss(*tensors, **settings)


def balanced(student_logits: Tensor, teacher_logits: Tensor, marginal: Tensor, **settings):
    """TEMI's loss with teacher probabilities that use all clusters of a batch alike.

    By three rounds of Sinkhorn and Knopp, as SwAV has them (Caron et al., NeurIPS 2020).
    """
    temperature = settings["teacher_temp"]
    log_probs = teacher_logits.to(marginal.dtype) / temperature
    for _ in range(3):
        log_probs = log_probs.log_softmax(dim=1).log_softmax(dim=2)
    return losses.temi_loss(student_logits, log_probs * temperature, marginal, **settings)


def with_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    marginal: Tensor,
    weight: float = 0.2,
    **settings,
):
    """TEMI's loss plus the cross-entropy between a pair's teacher and student, weighed as pairs."""
    found, marginal = losses.temi_loss(student_logits, teacher_logits, marginal, **settings)
    size = settings["group_size"]
    log_student = (student_logits.to(marginal.dtype) / settings["student_temp"]).log_softmax(dim=-1)
    teacher = (teacher_logits.to(marginal.dtype) / settings["teacher_temp"]).softmax(dim=-1)
    batch = teacher.shape[1] // size
    for shift in range(batch, size * batch, batch):
        partner = teacher.roll(shift, dims=1)
        pair_weights = losses.pair_weights(teacher, partner).mean(dim=0)
        entropy = -(partner * log_student).sum(dim=-1)
        found = found + weight * (pair_weights * entropy).mean(dim=-1) / (size - 1)
    return found, marginal


def embeddings(images: temi.ImageSet) -> dict[str, Features]:
    """What the variants that are named here train on; the others train on that of ``fast``."""
    files = Mirrored(images.images.root, images.images.names)
    mirrored = dataclasses.replace(images, name=f"{images.name}-mirrored", images=files)
    plain, turned = (temi.embed(each, BACKBONE, precision="fp32") for each in (images, mirrored))
    mean = (np.asarray(plain.x, dtype=np.float32) + turned.x) / 2
    both = temi.embed(images, f"{BACKBONE}+{LARGER}", precision="fp32")
    found = {"fast": plain, "mirror image": dataclasses.replace(plain, x=mean)}
    return found | {variant: both for variant in VARIANTS if "two sizes" in variant}


def train(variant: str, features: Features, seed: int, precision: str) -> temi.Run:
    settings = {"num_clusters": features.num_classes, "seed": seed, "precision": precision}
    k = temi.TrainConfig(**settings).resolve(len(features)).num_neighbors
    settings |= {"num_neighbors": k // 2 if "fewer" in variant else k}
    config = temi.TrainConfig(**settings, mutual_neighbors="mutual" in variant)
    loss = {"no pair weight": unweighted, "balanced assignments": balanced,
            "cross-entropy": with_cross_entropy}  # fmt: skip
    neighbors = None
    if variant == "adaptive neighbours":
        x = torch.from_numpy(normalize(features.x, config.normalize))
        neighbors = adaptive_neighbors(x, k)
    with patch("temi.steps.temi_loss", loss.get(variant, losses.temi_loss)):
        return temi.train(features, config, neighbors=neighbors, progress=False)


def classified(run: temi.Run, features: Features) -> np.ndarray:
    """Labels of a classifier that learned those that most heads agree on."""
    x, sure = run.inputs(features).numpy(), run.agreement >= AGREED
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    return classifier.fit(x[sure], run.labels[sure]).predict(x)


def scores(
    labels: np.ndarray, features: Features, prepared: np.ndarray, nearest: np.ndarray
) -> dict[str, float]:
    """Of labels: three scores against the classes, and two that need none.

    The latter are of the ``prepared`` embeddings [N, D], and of their ``nearest`` rows [N, k].
    """
    found = temi.evaluate(labels, features.labels)
    found = {name: found[name] for name in ("acc", "nmi", "ari")}
    information = temi.neighbor_information(labels, nearest)
    found["information"] = information / np.log(features.num_classes)
    found["silhouette"] = temi.silhouette(prepared, labels)
    return {name: round(float(value), 4) for name, value in found.items()}


def measure(name: str, images: temi.ImageSet, seeds: int, precision: str) -> None:
    """The rows of a data set that are not there yet."""
    spaces = embeddings(images)
    plain = spaces["fast"]
    prepared = normalize(plain.x, "center-l2")
    nearest = temi.nearest_neighbors(torch.from_numpy(prepared), 10)[0].numpy()
    score = partial(scores, features=plain, prepared=prepared, nearest=nearest)
    for seed in range(seeds):
        for variant in VARIANTS:
            row = {"dataset": name, "variant": variant, "seed": seed, "precision": precision}
            if has(FILE, row, [*RUN, "precision"]):
                continue
            features = spaces.get(variant, plain)
            if variant.startswith("k-means"):
                rows = [row | score(temi.kmeans(features.x, features.num_classes, seed=seed))]
            else:
                run = train(variant, features, seed, precision)
                row["agreement"] = round(run.agreement.mean(), 4)
                row["seconds"] = round(sum(run.seconds.values()), 1)
                rows = [row | score(run.labels)]
            if variant == "fast":
                labels = classified(run, features)
                rows.append(row | {"variant": CLASSIFIER} | score(labels))
            print(pd.DataFrame(rows).to_string(index=False, header=False), flush=True)
            put(FILE, rows, RUN, COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--images", type=pair, action="append", metavar="NAME=FOLDER", required=True)
    option("--seeds", type=int, default=3)
    option("--precision", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args()
    for name, folder in options.images:
        measure(name, temi.load_images(folder, labels="folders"), options.seeds, options.precision)


if __name__ == "__main__":
    main()
