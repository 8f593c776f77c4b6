"""Claim: large JPEG files decoded smaller give the same embeddings, in about half the time.

Where three times the side that the network needs remain, ``temi.image_files.decode`` has a JPEG
decoded at a half, a quarter or an eighth of its size. Of all images of a folder, large photographs,
this takes both ways the seconds from file to what the network gets, and the cosine between the
embeddings of the two by EfficientNet-Lite0 (224 pixels, trained with ImageNet's labels, fp32);
beside it, as a measure, the cosine between those of whole pictures in fp32 and in bf16, where
products in it run. Writes results/benchmarks/large_photographs.json.

    python benchmarks/large_photographs.py FOLDER

What is stored is of the 40 photographs and drawings in these packages of Debian 12:

    apt-get download gnome-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 \\
        mate-backgrounds sway-backgrounds ukui-wallpapers
    for file in *.deb; do dpkg-deb -x $file FOLDER; done
    find FOLDER -not -type d -not -iname '*.jpg' -delete
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

import temi
from temi.backbones import Backbone
from temi.devices import half_precision, runs_bf16
from temi.files import write_json
from temi.image_files import ENOUGH, ImageFiles, needed_at

RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "large_photographs.json"
ROUNDS = 3


def prepared(backbone: Backbone, files: ImageFiles) -> tuple[float, torch.Tensor]:
    """Seconds an image, and what the network gets."""
    clock = time.perf_counter()
    pixels = [backbone.prepare(picture) for picture in files]
    return (time.perf_counter() - clock) / len(files), torch.from_numpy(np.stack(pixels))


def embedded(backbone: Backbone, pixels: torch.Tensor, precision: str) -> torch.Tensor:
    with torch.inference_mode(), half_precision(precision, torch.device("cpu")):
        return torch.cat([backbone.model(part).float() for part in pixels.split(8)])


def least_and_mean(a: torch.Tensor, b: torch.Tensor) -> dict[str, float]:
    cosine = cosine_similarity(a, b)
    return {"least": round(float(cosine.min()), 5), "mean": round(float(cosine.mean()), 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    images = temi.load_images(parser.parse_args().folder)
    backbone = temi.load_backbone("efficientnet_lite0")
    ways = {"whole": images.images, "smaller": needed_at(images.images, backbone.side)}
    seconds, pixels = {name: [] for name in ways}, {}
    for _ in range(ROUNDS):
        for name, files in ways.items():
            taken, pixels[name] = prepared(backbone, files)
            seconds[name].append(taken)
    x = {name: embedded(backbone, seen, "fp32") for name, seen in pixels.items()}
    areas = [picture.shape[0] * picture.shape[1] for picture in images.images]
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    results = {
        "images": len(images),
        "megapixels": round(statistics.mean(areas) / 1e6, 1),
        "ms_per_image": {name: round(1e3 * taken, 1) for name, taken in middle.items()},
        "times_faster": round(middle["whole"] / middle["smaller"], 2),
        "cosine": {"smaller": least_and_mean(x["whole"], x["smaller"])},
        "conditions": {"enough": ENOUGH, "rounds": ROUNDS, "cores": os.cpu_count(),
                       "torch": torch.__version__},
    }  # fmt: skip
    if runs_bf16("cpu"):
        half = embedded(backbone, pixels["whole"], "bf16")
        results["cosine"]["bf16"] = least_and_mean(x["whole"], half)
    print(results)
    write_json(RESULT, results)


if __name__ == "__main__":
    main()
