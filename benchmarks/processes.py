"""Claim: two processes embed the very file of one, and train to the clusters of one.

The photographs of a folder are embedded with EfficientNet-Lite0 at 112 pixels and clustered by the
recipe ``fast``, by one process and by ``torchrun`` with several, each with one thread, into caches
and runs of their own. Compared are the bytes of embeddings and ids, and the share of images in the
same cluster. Stated are both scores (labels, the sub-folders' names, do nothing else), wall seconds
of each whole command, from its start to its end, and for each process the peak of anonymous
resident memory (RssAnon: what cannot be dropped and read again from a file).

    python benchmarks/processes.py --images PATH-TO-CIFAR10-JPEG/test

As many cores as processes are needed, and nothing else that runs on them. Two processes on two
cores have nothing that two threads have not; several GPUs or machines are what they are for, and
were not measured. Linux alone, for /proc. Writes results/benchmarks/processes.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

import temi
from benchmarks.scale import AnonymousPeak
from temi.__main__ import main as command_line
from temi.files import write_json

FILE = Path(__file__).parents[1] / "results" / "benchmarks" / "processes.json"
BACKBONE = ["--backbone", "efficientnet_lite0", "--image-size", "112", "--device", "cpu",
            "--precision", "fp32"]  # fmt: skip


def command_here(folder: Path, command: list[str]) -> None:
    """What each process does: a command of temi; leaves its peak of memory in the folder."""
    with AnonymousPeak() as memory:
        status = command_line(command)
    write_json(folder / f"rank{os.environ.get('RANK', '0')}.json", memory.peak)
    if status:
        sys.exit(status)


def measure(processes: int, folder: Path, command: list[str]) -> dict:
    """Run a command of temi in so many processes: seconds, and GB at the peak of each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = [sys.executable, *launcher * (processes > 1), __file__, "--here", str(folder)]
    clock = time.perf_counter()
    subprocess.run(
        [*launcher, "--images", *command], check=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TEMI_HOME": str(folder)},
    )  # fmt: skip
    seconds = time.perf_counter() - clock
    peaks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
    return {"processes": processes, "seconds": round(seconds, 1),
            "peak_gb": [round(peak, 2) for peak in peaks]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, nargs=argparse.REMAINDER)
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)  # in each process
    given = parser.parse_args()
    if given.here:
        command_here(given.here, given.images)
        return
    images = temi.load_images(given.images[0], labels="folders")
    embedded, trained, caches, labels = [], [], [], []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = str(Path(given.images[0]).absolute())
            embedded.append(measure(processes, folder, ["embed", path, *BACKBONE]))
            (manifest,) = folder.rglob("manifest.json")
            files = [manifest.with_name(part) for part in ("embeddings.npy", "ids.json")]
            caches.append([file.read_bytes() for file in files])
            settings = ["--labels", "folders", "--run-dir", "run"]
            row = measure(processes, folder, ["train", path, *BACKBONE, *settings])
            scores = json.loads((folder / "run" / "final_results.json").read_text())["metrics"]
            trained.append(row | {name: round(scores[name], 4) for name in ("acc", "nmi")})
            labels.append(pd.read_csv(folder / "run" / "assignments.csv")["cluster"])
        print(embedded[-1], trained[-1], flush=True)
    conditions = {"cores": os.cpu_count(), "threads_per_process": 1, "torch": torch.__version__,
                  "load_at_the_end": round(os.getloadavg()[0], 1)}  # fmt: skip
    results = {
        "images": len(images),
        "embed": embedded,
        "identical": caches[0] == caches[1],
        "train": trained,
        "same_cluster": round(float((labels[0] == labels[1]).mean()), 4),
        "conditions": conditions,
    }
    print(json.dumps(results, indent=2))
    write_json(FILE, results)


if __name__ == "__main__":
    main()
