"""Claim: keeping a run whole costs under 10% of the time of its steps.

Trains 16 heads of the default recipe on 10,000 embeddings of 1280 dimensions, with everything that
a run writes while it grows: checkpoints, results, assignments, TensorBoard. Against it stand the
steps alone of the same training with nothing written. The two take turns, so that both meet the
same other load of the machine; the ratio is that of the medians. Writes
results/benchmarks/checkpointing.json.

    python benchmarks/checkpointing.py [--features FILE.npz] [--epochs 3] [--rounds 3]

FILE.npz holds ``X`` [N, D]; without it, random embeddings around ten centres are taken.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

import temi
import temi.training
from temi.devices import device_name, resolve_device
from temi.files import results_file, write_json
from temi.records import Record


class TimedRecord(Record):
    """Knows the seconds from the first step until all is written that the last epoch leaves."""

    seconds = 0.0

    def __enter__(self):
        self.clock = time.perf_counter()
        return self

    def finish(self, *arguments):
        self.pending.result()
        TimedRecord.seconds = time.perf_counter() - self.clock
        super().finish(*arguments)


def embeddings(file: Path | None) -> np.ndarray:
    if file is not None:
        return np.load(file)["X"]
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 1280)).astype(np.float32)
    noise = rng.normal(size=(10_000, 1280)).astype(np.float32)
    return centres[rng.integers(10, size=10_000)] + 3 * noise


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--features", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    x = embeddings(arguments.features)
    config = temi.TrainConfig(num_clusters=10, epochs=arguments.epochs)
    temi.training.Record = TimedRecord
    steps, kept, size = [], [], 0
    for _ in range(arguments.rounds):
        bare = temi.train(x, config)
        steps.append(sum(entry["seconds"] for entry in bare.history))
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            temi.train(x, config, run_dir=run_dir, checkpoint_every=1)
            size = (run_dir / "checkpoints" / "checkpoint_latest.pth").stat().st_size
        kept.append(TimedRecord.seconds)
        print(f"steps alone {steps[-1]:.2f} s, everything kept {kept[-1]:.2f} s")
    ratio = median(kept) / median(steps)
    result = {
        "claim": "keeping a run whole costs under 10% of the time of its steps",
        "cost": ratio - 1,
        "seconds_steps": steps,
        "seconds_kept": kept,
        "epochs": arguments.epochs,
        "embeddings": list(x.shape),
        "heads": config.num_heads,
        "checkpoint_bytes": size,
        "threads": torch.get_num_threads(),
        "device": device_name(resolve_device(config.device)),
        "torch": torch.__version__,
    }
    write_json(results_file("benchmarks/checkpointing.json"), result)
    print(f"cost {ratio - 1:.1%} of the steps; a checkpoint has {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
