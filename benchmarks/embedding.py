"""How near extraction comes to the speed of the backbone alone, and that its memory stays flat.

Images a second from JPEG files to an array on disk (decoding, resizing, forward pass, writing; the
backbone is loaded already), beside those of the backbone's forward pass alone on tensors that are
ready, with the same batches, precision and threads, right before and right after it in one run. The
forward pass is also timed once with batches of 64, which a plain loop might take, and once before
glibc is told to keep freed memory (``temi.devices.keep_freed_memory``). And the peak memory of the
extracting process for 10,000 and 60,000 images. Writes results/benchmarks/NAME.json.

    python benchmarks/embedding.py PATH-TO-CIFAR10-JPEG
    python benchmarks/embedding.py PATH-TO-CIFAR10-JPEG --device cuda --name embedding_gpu

The folder holds train/ and test/, 60,000 files in all. bfloat16 is left out where products in it do
not run.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

import temi
from temi.backbones import Backbone
from temi.devices import device_name, half_precision, runs_bf16
from temi.extraction import ExtractionConfig, default_batch_size, extract
from temi.files import write_json

RESULTS = Path(__file__).parents[1] / "results" / "benchmarks"
BACKBONE = "efficientnet_lite0"
SIZES = {96: 2048, 112: 2048, 224: 512}  # pixels -> images timed
ON_GPU = {112: 10_000, 224: 10_000}
PLAIN_BATCH = 64
ROUNDS = 5


def images_of(folder: str, count: int) -> temi.ImageSet:
    images = temi.load_images(folder)
    return images.keep(images.ids[:: len(images) // count][:count])


def pipeline_seconds(images: temi.ImageSet, backbone: Backbone, device="cpu", **options) -> float:
    with tempfile.TemporaryDirectory() as folder:
        config = ExtractionConfig(device=device, progress=False, **options)
        clock = time.perf_counter()
        extract(images, backbone, Path(folder), {}, config)
        return time.perf_counter() - clock


def batch_of(images: temi.ImageSet, backbone: Backbone, size: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(backbone.prepare(images.images[i])) for i in range(size)])


def forward_rate(backbone: Backbone, batch: torch.Tensor, count: int, precision: str) -> float:
    """Images a second of the forward pass alone, over at least ``count`` images."""
    model = backbone.model.to(batch.device).to(memory_format=torch.channels_last)
    passes = -(-count // len(batch))
    with torch.inference_mode(), half_precision(precision, batch.device):
        model(batch).cpu()
        clock = time.perf_counter()
        for _ in range(passes):
            x = model(batch)
        x.cpu()  # waits for a GPU
        return passes * len(batch) / (time.perf_counter() - clock)


def speeds(folder: str, device: torch.device) -> list[dict]:
    sizes, precisions = ON_GPU, ["bf16"]
    if device.type == "cpu":
        sizes, precisions = SIZES, ["fp32"] + ["bf16"] * runs_bf16("cpu")
    kinds = list(itertools.product(sizes.items(), precisions))
    before = []  # in this process nobody has called keep_freed_memory yet
    for (size, count), precision in kinds:
        backbone = temi.load_backbone(BACKBONE, image_size=size)
        batch_size = default_batch_size(backbone, device, precision)
        batch = batch_of(images_of(folder, count), backbone, batch_size).to(device)
        before.append(forward_rate(backbone, batch, count, precision))
    rows = []
    digits = temi.load_images("digits")
    seconds = pipeline_seconds(digits, temi.load_backbone("pixels"))
    rows.append({"images": "digits", "backbone": "pixels", "images_per_s": len(digits) / seconds})
    for ((size, count), precision), at_first in zip(kinds, before, strict=True):
        images = images_of(folder, count)
        backbone = temi.load_backbone(BACKBONE, image_size=size)
        batch_size = default_batch_size(backbone, device, precision)
        batch = batch_of(images, backbone, batch_size).to(device)
        plain = batch_of(images, backbone, PLAIN_BATCH).to(device)
        ratios, rates, alone = [], [], []
        alone.append(forward_rate(backbone, batch, count, precision))
        for _ in range(ROUNDS):
            seconds = pipeline_seconds(images, backbone, device.type, precision=precision)
            rates.append(count / seconds)
            alone.append(forward_rate(backbone, batch, count, precision))
            ratios.append(rates[-1] / statistics.mean(alone[-2:]))
        rows.append(
            {"images": "CIFAR-10 (JPEG)", "backbone": BACKBONE, "pixels": size,
             "precision": precision, "batch": batch_size, "images_per_s": statistics.median(rates),
             "forward_alone_per_s": statistics.median(alone), "forward_before_per_s": at_first,
             "ratio": statistics.median(ratios), "ratio_min": min(ratios),
             "ratio_max": max(ratios),
             "forward_of_64_per_s": forward_rate(backbone, plain, count, precision), "n": count}
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def peak_memory(folder: str, count: int, queue) -> None:
    pipeline_seconds(images_of(folder, count), temi.load_backbone("pixels"), num_workers=2)
    status = Path("/proc/self/status").read_text()  # Linux; getrusage counts the parent's, too
    queue.put(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def peaks(folder: str) -> dict[str, float]:
    """Peak resident memory in MB of a fresh process that embeds so many images as pixels."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for count in (10_000, 60_000):
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(folder, count, queue))
        process.start()
        found[str(count)] = round(queue.get())
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="embedding", help="of the output")
    arguments = parser.parse_args()
    folder, device = arguments.folder, torch.device(arguments.device)
    rows = speeds(folder, device)
    memory = peaks(folder) if device.type == "cpu" else {}
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    print(f"peak memory in MB, by number of images: {memory}")
    conditions = {"device": device_name(device), "cores": os.cpu_count(),
                  "threads": torch.get_num_threads(),
                  "torch": torch.__version__, "rounds": ROUNDS,
                  "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "")}  # fmt: skip
    results = {"rows": rows, "peak_memory_mb": memory, "conditions": conditions}
    write_json(RESULTS / f"{arguments.name}.json", results)


if __name__ == "__main__":
    main()
