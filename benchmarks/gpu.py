"""What ``temi.estimate_costs`` takes for granted of a GPU, and how its times grow with the images.

The peak of matrix products in bfloat16 and float32; the share of it that forward passes reach
(DINOv2 with random weights, which take as long as trained ones, and EfficientNet-Lite0), in
bfloat16, on images that are on the GPU already; a training step of ``fast`` (256 numbers a row),
launched kernel by kernel and as one CUDA graph, by clusters and by images; the exact neighbour
search and the heads' labels of all images.

    python benchmarks/gpu.py

Takes a minute. Writes results/benchmarks/gpu.json.
"""

import argparse
import time
from pathlib import Path

import torch

import temi
from benchmarks.costs import CLUSTERS, HEADS, VITS, WIDTH, Operators, dinov2, neighbors_of, rows
from benchmarks.step import peak, seconds_of
from temi import ensemble
from temi.backbones import Backbone
from temi.costs import flops_per_image
from temi.devices import device_name, half_precision
from temi.files import write_json
from temi.graphs import RecordedStep
from temi.heads import MultiHead
from temi.steps import TrainState, training_step

FILE = Path(__file__).parents[1] / "results" / "benchmarks" / "gpu.json"
GPU = torch.device("cuda")
BATCH = 256


def forward(backbone: Backbone, side: int, peak_gflops: float) -> dict:
    """Images a second of the forward pass alone, and its share of the peak."""
    model = backbone.model.to(GPU).to(memory_format=torch.channels_last)
    batch = torch.randint(256, (BATCH, side, side, 3), dtype=torch.uint8, device=GPU)
    times = []
    with torch.inference_mode(), half_precision("bf16", GPU):
        for _ in range(5):
            clock = time.perf_counter()
            model(batch).cpu()  # which waits for it
            times.append(time.perf_counter() - clock)
    rate = BATCH / min(times)
    gflops = rate * flops_per_image(backbone.name, side) / 1e9
    return {"backbone": backbone.name, "pixels": side, "images_per_s": round(rate),
            "share_of_peak": round(gflops / peak_gflops, 3)}  # fmt: skip


def step(images: int, clusters: int) -> dict:
    """Milliseconds of a training step of ``fast``."""
    config = temi.TrainConfig(num_clusters=clusters, device="cuda")
    x = rows(images).to(GPU)
    drawn = torch.randint(images, (config.batch_size * config.group_size,), device=GPU)

    def state() -> TrainState:
        return TrainState.start(MultiHead(WIDTH, clusters, HEADS).to(GPU), 1e-4)

    one, other = state(), RecordedStep(state(), config)
    eager = seconds_of(lambda: training_step(one, x[drawn], config, 1e-4), GPU, 10)
    graph = seconds_of(lambda: other(x[drawn], 1e-4, 0.1), GPU, 10)
    with Operators() as operators:
        training_step(one, x[drawn], config, 1e-4)
    return {"images": images, "clusters": clusters, "ms": round(1e3 * eager, 3),
            "graph_ms": round(1e3 * graph, 3), "operators": operators.count}  # fmt: skip


def whole(images: int) -> dict:
    """Seconds of the exact search and of asking all heads about all images."""
    x, heads = rows(images).to(GPU), MultiHead(WIDTH, CLUSTERS, HEADS).to(GPU)
    seconds = {}
    for name, work in (
        ("exact-search", lambda: temi.nearest_neighbors(x, neighbors_of(images))),
        ("labels", lambda: ensemble.head_labels(heads, x)),
    ):
        torch.cuda.synchronize()
        clock = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds[name] = round(time.perf_counter() - clock, 3)
    return {"images": images, **seconds}


def main() -> None:
    peaks = {precision: round(peak(GPU, precision, 10)) for precision in ("bf16", "fp32")}
    results = {"device": device_name(GPU), "torch": torch.__version__, "peak_gflops": peaks}
    print(results, flush=True)
    with GPU:  # where random weights are made at once
        networks = map(dinov2, VITS)
        results["forward"] = [forward(network, 224, peaks["bf16"]) for network in networks]
    for side in (112, 224):
        backbone = temi.load_backbone("efficientnet_lite0", image_size=side)
        results["forward"].append(forward(backbone, side, peaks["bf16"]))
    results["step"] = [step(10_000, clusters) for clusters in (10, 100, 300, 1000)]
    results["step"] += [step(images, CLUSTERS) for images in (10**5, 10**6)]
    whole(10_000)  # what is done once does not count
    results["whole"] = [whole(images) for images in (10_000, 31_623, 100_000, 316_228)]
    for name in ("forward", "step", "whole"):
        print(*results[name], sep="\n", flush=True)
    write_json(FILE, results)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
