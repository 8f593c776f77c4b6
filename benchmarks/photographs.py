"""Claim: ten thousand photographs become groups in minutes on two cores, in under 2 GB.

Copies the test images of CIFAR-10 (JPEG), or all 60,000 (``--split both``), into one flat folder
without their classes, and runs on it, each command a process of its own,

    python -m temi embed FOLDER --backbone efficientnet_lite0 --image-size 112
    python -m temi cluster FOLDER --image-size 112 --num-clusters 10

in fp32, for their seconds and the most memory that each takes. EfficientNet-Lite0 was trained with
the labels of ImageNet; the classes of CIFAR-10 score what came out and do nothing else. Writes its
row of results/benchmarks/photographs.json and, for 10,000 images at 112 pixels, the picture
results/figures/cifar10_clusters.jpg.

    python benchmarks/photographs.py PATH-TO-CIFAR10-JPEG
    python benchmarks/photographs.py PATH-TO-CIFAR10-JPEG --image-size 224
    python benchmarks/photographs.py PATH-TO-CIFAR10-JPEG --split both
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import temi
from temi import plots
from temi.files import write_json

RESULTS = Path(__file__).parents[1] / "results"
FILE = RESULTS / "benchmarks" / "photographs.json"
CLUSTERS = "10"


def measured(log: Path, *arguments: str) -> dict[str, float]:
    """Seconds and most memory, in MB, of a command of temi; what is in the log is not run again."""
    known = json.loads(log.read_text()) if log.exists() else {}
    name = arguments[0]
    if f"{name}_s" not in known:
        clock = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "temi", *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"failed: python -m temi {' '.join(arguments)}")
        known[f"{name}_s"] = round(time.perf_counter() - clock, 1)
        known[f"{name}_mb"] = round(usage.ru_maxrss / 1000)
        write_json(log, known)
    return known


def flat_copy(source: Path, folder: Path, splits: tuple[str, ...]) -> dict[str, str]:
    """All images in one folder, under names that say nothing; their classes by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted(path for split in splits for path in (source / split).glob("*/*.jpg"))
    order = np.random.default_rng(0).permutation(len(paths))
    classes = {f"{place:05d}.jpg": paths[row].parent.name for place, row in enumerate(order)}
    for place, row in enumerate(order):
        shutil.copy(paths[row], folder / f"{place:05d}.jpg")
    return classes


def scored(folder: Path, out: Path, size: int, classes: dict[str, str]) -> dict:
    """Scores of the vote and of k-means, by classes that nothing before has seen."""
    images = temi.load_images(str(folder))
    features = temi.embed(images, "efficientnet_lite0", image_size=size, precision="fp32")
    _, y = np.unique([classes[name] for name in features.ids], return_inverse=True)
    run = temi.load_run(out / "run")
    found = {"vote": run.labels}
    found |= {f"kmeans {how}": temi.kmeans(features.x, int(CLUSTERS), how=how)
              for how in ("none", "center-l2")}  # fmt: skip
    if size == 112 and len(images) == 10_000:
        plots.use_style()
        figure = plots.cluster_rows(images.keep(features.ids).images, run.labels, run.agreement)
        figure.savefig(RESULTS / "figures" / "cifar10_clusters.jpg", pil_kwargs={"quality": 85})
    return {name: {score: round(value, 4) for score, value in temi.evaluate(labels, y).items()}
            for name, labels in found.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--split", choices=("test", "both"), default="test")
    parser.add_argument(
        "--place", type=Path, help="folder that is kept, to go on in after an interruption"
    )
    given = parser.parse_args()
    size, load = str(given.image_size), round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as temporary:
        place = given.place.absolute() if given.place else Path(temporary)
        os.environ["TEMI_HOME"] = str(place)
        folder, out, log = place / "photographs", place / "clusters", place / "measured.json"
        splits = ("test",) if given.split == "test" else ("train", "test")
        classes = flat_copy(given.folder, folder, splits)
        how = ["--image-size", size, "--precision", "fp32"]
        measured(log, "embed", str(folder), "--backbone", "efficientnet_lite0", *how)
        cluster = ["cluster", str(folder), "--num-clusters", CLUSTERS, *how]
        row = {"images": len(classes), "pixels": given.image_size}
        row |= measured(log, *cluster, "--overwrite", "--out", str(out))
        record = json.loads((out / "run" / "final_results.json").read_text())
        row["training_s"] = round(sum(record["provenance"]["seconds"].values()), 1)
        row["page_mb"] = round((out / "gallery.html").stat().st_size / 1e6, 1)
        row["scores"] = scored(folder, out, given.image_size, classes)
    row["conditions"] = {"cores": os.cpu_count(), "threads": torch.get_num_threads(),
                         "torch": torch.__version__, "load_before": load, "seed": 0}  # fmt: skip
    print(row)
    rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    rows = [old for old in rows if (old["images"], old["pixels"]) != (row["images"], row["pixels"])]
    order = sorted([*rows, row], key=lambda entry: (entry["images"], entry["pixels"]))
    write_json(FILE, {"rows": order})


if __name__ == "__main__":
    main()
