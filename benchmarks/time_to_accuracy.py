"""Claim: the ``fast`` recipe has the clusters of ``paper`` in about a hundredth of the time.

On one set of embeddings, in one process:

* ``plain``: the paper's recipe as one would write it first (``plain_temi.py``), over several seeds,
* ``paper``: the same recipe through :func:`temi.train`, which tells the code from the settings,
* ``fast``: the default recipe through :func:`temi.train`, over several seeds,
* k-means, raw and centred + L2.

Times are wall times from the embeddings in memory on: preparation, neighbour search, training.
Scoring is left out of all of them. Of ``plain`` the reading is that of the paper, the head of the
lowest loss, and the time that of its quickest seed; of ours the vote, and the mean time. ``fast``
has passed ``plain`` when its accuracy is that of the last epoch of ``plain``, mean of its seeds, or
above, and stays there; it is looked at four times an epoch.

    python benchmarks/time_to_accuracy.py --images PATH-TO-CIFAR10-JPEG/test --name cifar10

embeds a folder of images, one sub-folder a class, with EfficientNet-Lite0 at 112 pixels (the cache
keeps that for the next time); ``--features FILE.npz`` takes embeddings that are there: ``X`` [N, D]
and the classes ``y`` [N]. Classes score and do nothing else. Writes
results/benchmarks/time_to_accuracy_NAME.json;
``--baseline`` takes ``plain``, ``paper`` and k-means from such a JSON of the same machine. On a GPU
(``--device cuda``) eight processes load the batches of ``plain``.
"""

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from unittest import mock

import numpy as np
import sklearn
import torch
from sklearn.neighbors import NearestNeighbors

import temi
import temi.training
from benchmarks.plain_temi import build
from temi import ensemble
from temi.baselines import kmeans
from temi.devices import device_name
from temi.embeddings import Features
from temi.ensemble import head_labels
from temi.files import write_json
from temi.metrics import evaluate
from temi.state import Training

RESULTS = Path(__file__).parents[1] / "results"
PAPER_EPOCHS = 100


def entry(epoch: float, seconds: float, head: np.ndarray, vote: np.ndarray, y: np.ndarray) -> dict:
    """Scores of both readings after so many epochs."""
    scores = {"head": evaluate(head, y), "vote": evaluate(vote, y)}
    kept = {f"{reading}_{name}": round(scores[reading][name], 4)
            for reading in scores for name in ("acc", "nmi")}  # fmt: skip
    return {"epoch": round(epoch, 3), "seconds": round(float(seconds), 2), **kept}


def run_plain(x: np.ndarray, y: np.ndarray, config: temi.TrainConfig) -> dict:
    """Train the plain implementation; one entry of the trace an epoch."""
    clock = time.perf_counter()
    search = NearestNeighbors(n_neighbors=config.num_neighbors, metric="cosine", algorithm="brute")
    neighbors = torch.from_numpy(search.fit(x).kneighbors(return_distance=False))
    inputs = torch.from_numpy(x)
    model, loader = build(inputs, neighbors, config, config.device)
    seconds, trace = time.perf_counter() - clock, []
    for epoch in range(config.epochs):
        clock = time.perf_counter()
        losses = model.epoch(loader, epoch)
        seconds += time.perf_counter() - clock
        best, labels = int(losses.argmin()), model.labels(inputs)
        alignment = ensemble.align_heads(labels, config.num_clusters, best)
        aligned = ensemble.relabel(labels, alignment)
        vote, _ = ensemble.vote(aligned, config.num_clusters, best)
        trace.append(entry(epoch + 1, seconds, aligned[best], vote, y))
        print("plain", config.seed, trace[-1], flush=True)
    return {"seed": config.seed, "trace": trace}


def run_ours(x: np.ndarray, y: np.ndarray, config: temi.TrainConfig, parts: int) -> dict:
    """Train with :func:`temi.train`, once for the time and once for the scores on the way.

    The same seed gives the same training; the second looks at the heads after each of so many
    ``parts`` of an epoch, and what that takes is in no time.
    """
    config = config.resolve(len(x))
    clock = time.perf_counter()
    run = temi.train(x, config, progress=False)
    whole = time.perf_counter() - clock
    ends = run.seconds["neighbors"] + np.cumsum([0, *(epoch["seconds"] for epoch in run.history)])
    trace, steps, do_epoch = [], len(x) // config.batch_size, temi.training.run_epoch

    def look(training: Training, epoch: float) -> None:
        heads = head_labels(training.state.teacher, training.x)
        last = training.history[-1]["head_losses"] if training.step == 0 else training.losses
        best = int(torch.as_tensor(last).argmin())  # of the epoch so far
        aligned = ensemble.relabel(heads, ensemble.align_heads(heads, config.num_clusters, best))
        vote, _ = ensemble.vote(aligned, config.num_clusters, best)
        seconds = np.interp(epoch, np.arange(len(ends)), ends)
        trace.append(entry(epoch, seconds, aligned[best], vote, y))

    def in_parts(training: Training, *arguments) -> bool:
        for part in range(1, parts):
            do_epoch(training, until=part * steps // parts)
            look(training, training.epoch + training.step / steps)
        whole_epoch = do_epoch(training, *arguments)
        look(training, training.epoch)
        return whole_epoch

    with mock.patch("temi.training.run_epoch", in_parts):
        temi.train(x, config, progress=False)
    print(config.recipe, config.seed, f"{whole:.1f} s", trace[-1], flush=True)
    return {"seed": config.seed, "whole_seconds": round(whole, 2), "trace": trace}


def run_kmeans(x: np.ndarray, y: np.ndarray, clusters: int) -> dict:
    """Time and scores of k-means."""
    results = {}
    for how in ("none", "center-l2"):
        clock = time.perf_counter()
        labels = kmeans(x, clusters, how)
        seconds = round(time.perf_counter() - clock, 2)
        scores = evaluate(labels, y)
        results[how] = {"seconds": seconds, **{k: round(scores[k], 4) for k in ("acc", "nmi")}}
    return results


def passes(trace: list[dict], goal: float) -> float | None:
    """Seconds after which the vote is at ``goal`` or above, and stays; None if it does not."""
    below = [index for index, point in enumerate(trace) if point["vote_acc"] < goal]
    first = below[-1] + 1 if below else 0
    return trace[first]["seconds"] if first < len(trace) else None


def summary(results: dict) -> dict:
    """What the claim is about, means over the seeds."""
    ends, fast = [run["trace"][-1] for run in results["plain"]], results["fast"]
    plain_acc = results.get("goal") or float(np.mean([end["head_acc"] for end in ends]))
    whole = PAPER_EPOCHS / ends[0]["epoch"]  # 1, unless plain was cut short
    plain_seconds = whole * min(end["seconds"] for end in ends)
    times = [passes(run["trace"], plain_acc) for run in fast]
    votes = [run["trace"][-1]["vote_acc"] for run in fast]
    passing = None if None in times else float(np.mean(times))
    fast_seconds = float(np.mean([run["whole_seconds"] for run in fast]))
    return {
        "plain_seconds": round(plain_seconds, 2),
        "plain_head_acc": round(plain_acc, 4),
        "fast_passes_after_seconds": times,
        "passing_ratio": passing and round(plain_seconds / passing, 1),
        "fast_whole_seconds": round(fast_seconds, 2),
        "whole_ratio": round(plain_seconds / fast_seconds, 1),
        "fast_vote_acc": f"{np.mean(votes):.4f} +- {np.std(votes, ddof=1):.4f}",
        "fast_vote_nmi": round(float(np.mean([r["trace"][-1]["vote_nmi"] for r in fast])), 4),
        "above_plain": round(float(np.mean(votes)) - plain_acc, 4),
        "above_kmeans": round(float(np.mean(votes)) - max(
            scores["acc"] for scores in results["kmeans"].values()), 4),
    }  # fmt: skip


def load(images: Path | None, file: Path | None) -> Features:
    """Embeddings with their classes."""
    if images is None:
        return temi.load_features(file)
    folder = temi.load_images(str(images), labels="folders")
    return temi.embed(folder, "efficientnet_lite0", image_size=112, precision="fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of a sub-folder for each class")
    source.add_argument("--features", type=Path, help="file with X and y")
    option("--name", help="of the outputs; default: that of the folder or file")
    option("--seeds", type=int, default=3, help="of fast")
    option("--plain-seeds", type=int, default=3, help="of plain")
    option(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of fast; the rest is fp32"
    )
    option("--device", default="cpu", help="of all trainings; k-means runs on the CPU")
    option("--epochs", type=int, default=PAPER_EPOCHS, help="of the paper's recipe")
    option(
        "--goal", type=float, help="ACC to pass where --epochs cuts it short; its time is scaled"
    )
    option("--baseline", type=Path, help="JSON with plain, paper and k-means")
    option("--skip-paper", action="store_true", help="leave the second line out")
    arguments = parser.parse_args()
    if arguments.epochs < PAPER_EPOCHS and arguments.goal is None and not arguments.baseline:
        parser.error(f"--epochs {arguments.epochs}: cut short, --goal has to say what to pass")
    name = arguments.name or (arguments.images or arguments.features).stem
    features = load(arguments.images, arguments.features)
    x, y = np.asarray(features.x, dtype=np.float32), features.labels
    clusters = len(np.unique(y))
    settings = {"num_clusters": clusters, "device": arguments.device}
    torch.ones(1, device=arguments.device)  # what a process does once on a GPU is in no time

    file = RESULTS / "benchmarks" / f"time_to_accuracy_{name}.json"
    if arguments.baseline:
        results = json.loads(arguments.baseline.read_text())
    else:
        paper = temi.TrainConfig(
            recipe="paper", epochs=arguments.epochs, precision="fp32", **settings
        )
        results = {"kmeans": run_kmeans(x, y, clusters), "plain": []}
        results["paper"] = [] if arguments.skip_paper else [run_ours(x, y, paper, 1)]
        for seed in range(arguments.plain_seeds):
            results["plain"].append(run_plain(x, y, dataclasses.replace(paper, seed=seed)))
            write_json(file, results)  # what took long is kept, whatever comes
    results["fast"] = [
        run_ours(x, y, temi.TrainConfig(seed=seed, precision=arguments.precision, **settings), 4)
        for seed in range(arguments.seeds)
    ]
    results["goal"] = arguments.goal or results.get("goal")
    results |= {
        "data": {"name": name, "images": len(x), "dimensions": x.shape[1], "clusters": clusters},
        "precision_of_fast": arguments.precision,
        "summary": summary(results),
        "machine": {"device": device_name(torch.device(arguments.device)),
                    "threads": torch.get_num_threads(), "processor": platform.machine(),
                    "cpu": torch.backends.cpu.get_cpu_capability()},
        "versions": {"torch": torch.__version__, "numpy": np.__version__,
                     "scikit-learn": sklearn.__version__, "python": platform.python_version()},
    }  # fmt: skip
    write_json(file, results)
    print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()
