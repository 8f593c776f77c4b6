"""Claim: several processes embed a folder into the very file of one, in less time, in flat memory.

The photographs of a folder are embedded by one process and by torchrun with several, each with one
thread, into caches of their own. Compared are the bytes of the arrays and of the ids; wall seconds
of the whole command, from its start to its end, in turns; and for each process the peak of
anonymous resident memory (RssAnon: what cannot be dropped and read again from a file), which should
not grow with the number of images that the process embeds.

    python benchmarks/shards.py --images PATH-TO-CIFAR10-JPEG/test

As many cores as processes are needed, and nothing else that runs on them. Linux alone, for /proc.
Writes results/benchmarks/shards.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import temi
from benchmarks.scale import AnonymousPeak
from temi.__main__ import main as command_line
from temi.files import write_json

FILE = Path(__file__).parents[1] / "results" / "benchmarks" / "shards.json"
OPTIONS = ["--backbone", "efficientnet_lite0", "--image-size", "112"]


def embed_here(images: str, data_dir: Path) -> None:
    """What each process does; leaves its peak of memory beside the cache."""
    with AnonymousPeak() as memory:
        status = command_line(["embed", images, "--data-dir", str(data_dir), *OPTIONS])
    write_json(data_dir / f"rank{os.environ.get('RANK', '0')}.json", memory.peak)
    if status:
        sys.exit(status)


def embed(images: str, data_dir: Path, processes: int) -> dict:
    """Embed in so many processes: seconds, and GB at the peak of each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher * (processes > 1), __file__, "--images", images]
    clock = time.perf_counter()
    subprocess.run(
        [*command, "--data-dir", str(data_dir)], check=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seconds = time.perf_counter() - clock
    peaks = [json.loads(path.read_text()) for path in sorted(data_dir.glob("rank*.json"))]
    return {"processes": processes, "seconds": seconds, "peak_gb": peaks}


def contents(data_dir: Path) -> list[bytes]:
    (folder,) = (path.parent for path in data_dir.rglob("manifest.json"))
    return [(folder / name).read_bytes() for name in ("embeddings.npy", "ids.json")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, help=argparse.SUPPRESS)  # in each process
    given = parser.parse_args()
    if given.data_dir:
        embed_here(given.images, given.data_dir)
        return
    rows, made = [], []
    for _ in range(given.rounds):
        for processes in (1, given.processes):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(embed(given.images, Path(folder), processes))
                made.append(contents(Path(folder)))
            print(rows[-1], flush=True)
    identical = all(files == made[0] for files in made)
    print(f"identical embeddings.npy and ids.json: {identical}")
    conditions = {"images": len(temi.load_images(given.images)), "options": OPTIONS,
                  "threads_per_process": 1, "cores": os.cpu_count(), "rounds": given.rounds,
                  "load_at_the_end": os.getloadavg(), "torch": torch.__version__}  # fmt: skip
    write_json(FILE, {"rows": rows, "identical": identical, "conditions": conditions})


if __name__ == "__main__":
    main()
