"""Claim: every chapter runs in a few minutes on a laptop, and in less than 2 GB of memory.

Runs each numbered notebook once, as it is, in a process of its own and with an empty cache, and
writes seconds and memory to results/run_times.csv, machine and versions to results/versions.csv.

    python benchmarks/run_times.py
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("temi", "numpy", "pandas", "pillow", "scikit-learn", "scipy", "timm", "torch",
            "torchvision", "matplotlib", "jupyter-book")  # fmt: skip


def main() -> None:
    rows = []
    for notebook in sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb")):
        seconds, largest = run(notebook)
        rows.append({"Chapter": notebook.stem, "Seconds": seconds, "Memory (GB)": largest})
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(ROOT / "results" / "run_times.csv", index=False)
    machine = {
        "Processor": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
        "Threads of PyTorch": torch.get_num_threads(),
        "System": platform.system(),
        "Python": platform.python_version(),
    }
    machine |= {package: version(package) for package in PACKAGES}
    pd.Series(machine, name="Here").rename_axis("What").to_csv(ROOT / "results" / "versions.csv")
    assert table["Seconds"].max() < 300
    assert table["Memory (GB)"].max() < 2


def run(notebook: Path) -> tuple[int, float]:
    """Wall seconds of one notebook, and the most memory that any of its processes held, in GB."""
    with tempfile.TemporaryDirectory() as home:
        code = (
            "import resource, sys, papermill\n"
            f"papermill.execute_notebook({str(notebook)!r}, {str(Path(home) / 'out.ipynb')!r},\n"
            f"    cwd={str(ROOT)!r}, progress_bar=False, log_output=False)\n"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        clock = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"TEMI_HOME": home}, check=True,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        seconds = round(time.perf_counter() - clock)
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, kilobytes elsewhere
    return seconds, round(int(result.stdout.split()[-1]) * unit / 1e9, 1)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
