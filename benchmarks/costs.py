"""Claim: time is a power law in the number of images, which foretells a size it was not fitted to.

For each stage of a run, on one core: processor's seconds (which other work on the machine changes
little), wall time and the peak of anonymous resident memory at growing numbers of random
embeddings, 256 numbers each as the recipe ``fast`` has them, 16 heads, 100 clusters and as many
neighbours as ``fast`` looks for. A line through log time against log size is the law, its slope
the exponent, given with its standard error; and once more without the largest size, whose time is
foretold and compared. A training step is measured beside them, which should not depend on the
number of images; the forward pass of a DINOv2 ViT-S/14 (random weights) and of EfficientNet-Lite0,
the decoding of a photograph, and the peak of matrix products.

    OMP_NUM_THREADS=1 python benchmarks/costs.py

Takes some minutes and 3 GB. With names of stages, as ``exact-search vote``, these
alone are measured again and the others stay. Linux alone, for /proc. Writes
results/benchmarks/costs.json, of which temi/costs.py holds the figures, rounded.
"""

import argparse
import io
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import sklearn
import torch
from PIL import Image, ImageFilter
from scipy.stats import linregress
from torch.utils._python_dispatch import TorchDispatchMode

import temi
from benchmarks.scale import AnonymousPeak, alone
from temi import ensemble
from temi.backbones import Backbone
from temi.costs import flops_per_image
from temi.extraction import default_batch_size
from temi.files import write_json
from temi.heads import MultiHead
from temi.image_files import decode
from temi.preprocessing import IMAGENET_DEVIATION, IMAGENET_MEAN, Normalised, config, prepare
from temi.steps import TrainState, training_step

FILE = Path(__file__).parents[1] / "results" / "benchmarks" / "costs.json"
WIDTH, CLUSTERS, HEADS = 256, 100, 16
CPU = torch.device("cpu")
VITS = {"s": "small", "b": "base", "l": "large", "g": "giant"}
DINOV2 = config(224, "bicubic", 224 / 256)  # how images are prepared for it


def processor_seconds(work, repeats: int) -> float:
    """Median of a call, after one that does not count."""
    torch.set_num_threads(1)
    seconds = []
    for _ in range(repeats + 1):
        used = time.process_time()
        work()
        seconds.append(time.process_time() - used)
    return float(np.median(seconds[1:]))


def neighbors_of(images: int) -> int:
    return temi.TrainConfig(num_clusters=CLUSTERS).resolve(images).num_neighbors


def rows(images: int) -> torch.Tensor:
    return torch.randn(images, WIDTH, generator=torch.Generator().manual_seed(0))


def random_labels(images: int) -> np.ndarray:
    """Of all heads; half of them those of a random truth, so that there is something to align."""
    random = np.random.default_rng(0)
    noise = random.integers(CLUSTERS, size=(HEADS, images))
    truth = random.integers(CLUSTERS, size=images)
    return np.where(random.random((HEADS, images)) < 0.5, noise, truth)


def align_and_vote(labels: np.ndarray) -> None:
    alignment = ensemble.align_heads(labels, CLUSTERS, 0)
    ensemble.vote(ensemble.relabel(labels, alignment), CLUSTERS, 0)


# Stage -> numbers of images, what is prepared for so many, and what is measured of that.
STAGES = {
    "exact-search": (
        (3162, 10_000, 31_623, 100_000), rows,
        lambda x: temi.nearest_neighbors(x, neighbors_of(len(x))),
    ),
    "approximate-search": (
        (10_000, 31_623, 100_000), rows,
        lambda x: temi.approximate_neighbors(x, neighbors_of(len(x))),
    ),
    "labels": (
        (3162, 10_000, 31_623, 100_000), rows,
        lambda x: ensemble.head_labels(MultiHead(WIDTH, CLUSTERS, HEADS), x),
    ),
    "vote": ((10_000, 31_623, 100_000, 316_228, 1_000_000), random_labels, align_and_vote),
    "kmeans": (
        (1778, 3162, 5623, 10_000), lambda images: rows(images).numpy(),
        lambda x: temi.kmeans(x, CLUSTERS),
    ),
}  # fmt: skip


def measure(stage: str, images: int) -> dict:
    """Time and memory of a stage, in this process, which does nothing else."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    _, prepared, work = STAGES[stage]
    given = prepared(images)
    with AnonymousPeak() as memory:
        clock, used = time.perf_counter(), time.process_time()
        work(given)
        seconds, wall = time.process_time() - used, time.perf_counter() - clock
    return {"images": images, "seconds": round(seconds, 3), "wall_seconds": round(wall, 3),
            "peak_gb": round(memory.peak, 3)}  # fmt: skip


def power_law(points: list[dict]) -> dict:
    """Seconds at 100,000 images, exponent and its standard error; and the largest size foretold."""
    images = np.log([point["images"] / 1e5 for point in points])
    seconds = np.log([point["seconds"] for point in points])
    fit, without = linregress(images, seconds), linregress(images[:-1], seconds[:-1])
    foretold = float(np.exp(without.intercept + without.slope * images[-1]))
    measured = points[-1]["seconds"]
    return {
        "seconds_at_100000": round(float(np.exp(fit.intercept)), 3),
        "exponent": round(float(fit.slope), 3), "exponent_error": round(float(fit.stderr), 3),
        "left_out": {"images": points[-1]["images"], "foretold": round(foretold, 2),
                     "measured": measured, "error": round(foretold / measured - 1, 3)},
    }  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts what PyTorch starts: on a GPU, a kernel or more for each."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


def step() -> dict:
    """Seconds of a training step of ``fast`` by clusters, by images, and its operators."""

    def stepper(clusters: int, images: int):
        x, config = rows(images), temi.TrainConfig(num_clusters=clusters, precision="fp32")
        state = TrainState.start(MultiHead(WIDTH, clusters, HEADS), 1e-4)
        drawn = torch.randint(images, (config.batch_size * config.group_size,))
        return lambda: training_step(state, x[drawn], config, 1e-4)

    by_clusters = {k: processor_seconds(stepper(k, 10_000), 8) for k in (10, 100, 300, 1000)}
    by_images = {n: processor_seconds(stepper(CLUSTERS, n), 8) for n in (10**4, 10**5, 10**6)}
    slope, seconds = np.polyfit(*zip(*by_clusters.items(), strict=True), 1)
    with Operators() as operators:
        stepper(CLUSTERS, 10_000)()
    return {
        "clusters": {str(k): round(value, 4) for k, value in by_clusters.items()},
        "images": {str(n): round(value, 4) for n, value in by_images.items()},
        "seconds": round(float(seconds), 4), "seconds_per_cluster": round(float(slope), 6),
        "operators": operators.count,
    }  # fmt: skip


def dinov2(size: str) -> Backbone:
    """A network of DINOv2 with random weights, which take as long as trained ones."""
    import timm

    name = f"vit_{VITS[size]}_patch14_dinov2"
    network = timm.create_model(name, img_size=224, num_classes=0).eval()
    model = Normalised(network, IMAGENET_MEAN, IMAGENET_DEVIATION)
    prepared = prepare(DINOV2)
    return Backbone(f"dinov2_vit{size}14", "", "random", prepared, model, network.num_features)


def networks(peak_gflops: float) -> list[dict]:
    """Images a second of the forward pass alone, and its share of the peak."""
    found = []
    for backbone, side in (
        (dinov2("s"), 224),
        (temi.load_backbone("efficientnet_lite0", image_size=112), 112),
        (temi.load_backbone("efficientnet_lite0"), 224),
    ):
        size = default_batch_size(backbone, CPU, "fp32")
        batch = torch.zeros(size, side, side, 3, dtype=torch.uint8)
        model = backbone.model.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            rate = size / processor_seconds(lambda model=model, batch=batch: model(batch), 8)
        gflops = rate * flops_per_image(backbone.name, side) / 1e9
        found.append({"backbone": backbone.name, "pixels": side, "images_per_s": round(rate, 2),
                      "share_of_peak": round(gflops / peak_gflops, 3)})  # fmt: skip
    return found


def read_seconds(repeats: int = 30) -> dict:
    """Seconds from a JPEG file of 640 x 480 pixels to the 224 x 224 that DINOv2 sees."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    photograph = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))  # as smooth as those
    file = io.BytesIO()
    photograph.save(file, "JPEG", quality=90)
    ready = prepare(DINOV2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.jpg"
        path.write_bytes(file.getvalue())
        seconds = processor_seconds(lambda: ready(decode(str(path))), repeats)
    return {"seconds": round(seconds, 5), "file_kb": round(len(file.getvalue()) / 1e3)}


def peak_gflops() -> float:
    """The better of two square products, fp32, as in step.py."""
    rates = []
    for size in (2048, 4096):
        a = torch.randn(size, size)
        rates.append(2 * size**3 / processor_seconds(lambda a=a: a @ a, 3) / 1e9)
    return round(max(rates), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    stages = parser.parse_args().stages or STAGES
    results = json.loads(FILE.read_text()) if FILE.exists() else {"stages": {}}
    if stages is STAGES:
        results["peak_gflops"] = alone(peak_gflops)
        results["step"] = alone(step)
        results["forward"] = alone(networks, results["peak_gflops"])
        results["read"] = alone(read_seconds)
        results["conditions"] = {
            "cores": os.cpu_count(), "threads": 1, "machine": platform.machine(),
            "dimensions": WIDTH, "clusters": CLUSTERS, "heads": HEADS, "torch": torch.__version__,
            "numpy": np.__version__, "scikit-learn": sklearn.__version__,
            "faiss": faiss.__version__,
        }  # fmt: skip
        print({name: value for name, value in results.items() if name != "stages"}, flush=True)
    for stage in stages:
        points = []
        for images in STAGES[stage][0]:
            points.append(alone(measure, stage, images))
            print(stage, points[-1], flush=True)
        results["stages"][stage] = {"points": points, "fit": power_law(points)}
        print(stage, results["stages"][stage]["fit"], flush=True)
        write_json(FILE, results)


if __name__ == "__main__":
    main()
