"""Claim: two processes that share each batch find the clusters that one process finds.

Trains the recipe ``fast`` on the same embeddings in one process, and in two under ``torchrun``, one
thread each. Stated are the share of images in the same cluster, both scores, wall time from start
to end of the command, and each process's peak of anonymous resident memory (RssAnon). Two processes
on two cores are no faster than two threads; several GPUs, or several machines, are what they are
for, and were not measured.

    python benchmarks/data_parallel.py --images PATH-TO-CIFAR10-JPEG/test --name cifar10

embeds a folder of images, one sub-folder a class, with EfficientNet-Lite0 at 112 pixels, or finds
that in the cache; ``--features FILE.npz`` takes embeddings that are there: ``X`` [N, D] and the
classes ``y`` [N], which score and do nothing else. Linux alone, for /proc. Writes
results/benchmarks/data_parallel.json.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import temi
from temi.files import write_json

FILE = Path(__file__).parents[1] / "results" / "benchmarks" / "data_parallel.json"


def peaks(process: subprocess.Popen) -> dict[int, float]:
    """GB of RssAnon at the peak of each process that trains, by rank, until the command ends."""
    found: dict[int, float] = {}
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in map(int, [*children, process.pid]):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:  # it has ended
                continue
            rank = next((int(e[5:]) for e in environment if e.startswith(b"RANK=")), None)
            anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
            if anonymous and (rank is not None or not children):
                now = int(anonymous[1]) / 2**20
                found[rank or 0] = max(found.get(rank or 0, 0.0), now)
        time.sleep(0.05)
    return found


def train(processes: int, features: Path, clusters: int, folder: Path) -> dict:
    """Train by the command line; scores, seconds, and memory of each process."""
    run_dir = folder / f"run{processes}"
    command = ["-m", "temi", "train", str(features), "--num-clusters", str(clusters),
               "--run-dir", str(run_dir), "--device", "cpu", "--precision", "fp32"]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    clock = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    memory = peaks(process)
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds = time.perf_counter() - clock
    results = json.loads((run_dir / "final_results.json").read_text())
    scores = {name: round(results["metrics"][name], 4) for name in ("acc", "nmi")}
    training = results["provenance"]["seconds"]["training"]
    return {
        "processes": processes,
        **scores,
        "seconds": round(seconds, 1),
        "seconds_of_steps": round(training, 1),
        "peak_gb": {rank: round(peak, 2) for rank, peak in sorted(memory.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="FOLDER")
    source.add_argument("--features", type=Path, metavar="FILE")
    parser.add_argument("--name", required=True, help="of the data, for the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.features
        if file is None:
            images = temi.load_images(options.images, labels="folders")
            features = temi.embed(images, "efficientnet_lite0", image_size=112)
            file = Path(folder) / "features.npz"
            np.savez(file, X=features.x, y=features.labels)
        classes = temi.load_features(file).num_classes
        rows = [train(processes, file.absolute(), classes, Path(folder)) for processes in (1, 2)]
        one, two = (pd.read_csv(Path(folder) / f"run{n}" / "assignments.csv") for n in (1, 2))
    same = float((one["cluster"] == two["cluster"]).mean())
    results = {
        "data": options.name,
        "images": len(one),
        "rows": rows,
        "same_cluster": round(same, 4),
    }
    results["conditions"] = {"cores": os.cpu_count(), "threads_of_each": 1,
                             "torch": torch.__version__, "numpy": np.__version__}  # fmt: skip
    print(json.dumps(results, indent=2))
    write_json(FILE, results)


if __name__ == "__main__":
    main()
