"""What share of the machine's matrix-product peak a training step reaches.

The peak is the better median of products of 2048 and of 4096 squared, in the same precision, with
the same threads, in the same process. The operations of a step (both networks forward, the student
backward, optimiser, teacher) are counted by ``torch.utils.flop_counter``: matrix products alone, as
for the peak. Measured for clusters K and dimensions D, 16 heads and 512 pairs, then with
the numbers of heads and of rows (two a pair) varied; exponents are slopes of log time against log
size. A table says where the rest of the time goes.

    python benchmarks/step.py
    python benchmarks/step.py --device cuda --precision bf16 --name step_gpu

On a GPU each step is timed twice, launched kernel by kernel (``ms``) and as one CUDA graph
(``graph_ms``), and its share of the peak is that of the graph. Writes results/benchmarks/NAME.json.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import temi
from temi.devices import device_name
from temi.files import write_json
from temi.graphs import RecordedStep
from temi.heads import MultiHead
from temi.steps import TrainState, training_step

FOLDER = Path(__file__).parents[1] / "results" / "benchmarks"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLUSTERS, DIMENSIONS, HEADS, ROWS = (10, 100, 1000), (384, 768, 1280), 16, 1024


def seconds_of(work, device: torch.device, repeats: int) -> float:
    """Median wall time of a call, after two that do not count; on a GPU of twenty in a row."""
    times, calls = [], 20 if device.type == "cuda" else 1
    for _ in range(repeats + 2):
        clock = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - clock) / calls)
    return float(np.median(times[2:]))


def peak(device: torch.device, precision: str, repeats: int) -> float:
    """GFLOP/s of the better of two square products."""
    rates = []
    for size in (2048, 4096):
        a = torch.randn(size, size, device=device, dtype=DTYPES[precision])
        rates.append(2 * size**3 / seconds_of(lambda a=a: a @ a, device, repeats) / 1e9)
    return max(rates)


def make_step(clusters: int, dimensions: int, heads: int, rows: int, arguments, graph=False):
    """A call that does one training step on random images."""
    device = torch.device(arguments.device)
    config = temi.TrainConfig(recipe="paper", num_clusters=clusters, device=arguments.device,
                              precision=arguments.precision)  # fmt: skip
    state = TrainState.start(MultiHead(dimensions, clusters, heads).to(device), 1e-4)
    views = torch.randn(rows, dimensions, device=device)
    if graph:
        recorded = RecordedStep(state, config)
        return lambda: recorded(views, 1e-4, 0.1)
    return lambda: training_step(state, views, config, 1e-4)


def measure(clusters: int, dimensions: int, heads: int, rows: int, arguments) -> dict:
    """Operations, time and rate of a step."""
    sizes, device = (clusters, dimensions, heads, rows), torch.device(arguments.device)
    step = make_step(*sizes, arguments)
    with FlopCounterMode(display=False) as counter:
        step()
    seconds = seconds_of(step, device, arguments.repeats)
    gflop = counter.get_total_flops() / 1e9
    point = {"clusters": clusters, "dimensions": dimensions, "heads": heads, "rows": rows,
             "gflop": round(gflop, 2), "ms": round(1e3 * seconds, 3)}  # fmt: skip
    if device.type == "cuda":
        seconds = seconds_of(make_step(*sizes, arguments, graph=True), device, arguments.repeats)
        point["graph_ms"] = round(1e3 * seconds, 3)
    return point | {"gflops": round(gflop / seconds, 1)}


def exponent(points: list[dict], name: str) -> float:
    """Slope of log time against log size."""
    sizes, times = [p[name] for p in points], [p.get("graph_ms", p["ms"]) for p in points]
    return round(float(np.polyfit(np.log(sizes), np.log(times), 1)[0]), 2)


def profile_table(arguments) -> list[dict]:
    """Share of each operator in the time of a step at K = 100, D = 1280."""
    step = make_step(100, 1280, HEADS, ROWS, arguments)
    step()
    activities = [ProfilerActivity.CPU]
    if torch.device(arguments.device).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(3):
            step()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    events = sorted(events, key=lambda event: -event.self_cpu_time_total)[:15]
    return [{"operator": event.key, "share": round(event.self_cpu_time_total / total, 3)}
            for event in events]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--name", default="step", help="of the output")
    arguments = parser.parse_args()
    best = peak(torch.device(arguments.device), arguments.precision, arguments.repeats)
    print(f"peak {best:.0f} GFLOP/s")
    grid = []
    for clusters in CLUSTERS:
        for dimensions in DIMENSIONS:
            point = measure(clusters, dimensions, HEADS, ROWS, arguments)
            grid.append(point | {"share_of_peak": round(point["gflops"] / best, 3)})
            print(grid[-1], flush=True)
    heads = [measure(100, 768, h, ROWS, arguments) for h in (4, 8, 16, 32)]
    rows = [measure(100, 768, HEADS, r, arguments) for r in (256, 512, 1024, 2048)]
    results = {
        "precision": arguments.precision,
        "device": device_name(torch.device(arguments.device)),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "peak_gflops": round(best, 1),
        "grid": grid,
        "heads": heads,
        "rows": rows,
        "exponents": {
            "clusters": exponent([p for p in grid if p["dimensions"] == 768], "clusters"),
            "dimensions": exponent([p for p in grid if p["clusters"] == 100], "dimensions"),
            "heads": exponent(heads, "heads"),
            "rows": exponent(rows, "rows"),
        },
        "profile": profile_table(arguments),
    }
    write_json(FOLDER / f"{arguments.name}.json", results)
    print(json.dumps(results["exponents"]), *results["profile"], sep="\n")


if __name__ == "__main__":
    main()
