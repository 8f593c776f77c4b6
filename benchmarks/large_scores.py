"""Claim: 16 heads of 1.28M images in 1,000 clusters are read and scored in 3 minutes and 6 GB.

Random labels, of which half are those of a random truth, take the place of trained heads. Timed
one after the other: alignment and vote; accuracy, NMI and ARI of every head; the soft consensus,
streamed from random heads narrow enough that softmax and mean are what is timed, not the network.
Apart from these, the ANMI of the vote: its expected information is a sum over all pairs of sizes,
and takes as long as everything else. Beside the wall time stands the processors' time, which other
work on the machine changes little. Memory is the peak of anonymous resident memory (Linux).

    python benchmarks/large_scores.py

Writes results/benchmarks/large_scores.json.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn import metrics as sklearn_metrics

from benchmarks.scale import AnonymousPeak, alone
from temi import ensemble
from temi.files import write_json
from temi.heads import MultiHead
from temi.metrics import cluster_accuracy

FILE = Path(__file__).parents[1] / "results" / "benchmarks" / "large_scores.json"
IMAGES, CLUSTERS, HEADS = 1_281_167, 1000, 16
WIDTH = 16  # of the random heads' input and inner layers


def reading(images: int) -> dict:
    """Seconds of each reading and score of the heads, and GB at the peak."""
    random = np.random.default_rng(0)
    classes = random.integers(CLUSTERS, size=images)
    noise = random.random((HEADS, images)) < 0.5
    labels = np.where(noise, random.integers(CLUSTERS, size=(HEADS, images)), classes)
    torch.manual_seed(0)
    heads = MultiHead(WIDTH, CLUSTERS, HEADS, WIDTH, WIDTH).requires_grad_(False)
    x = torch.randn(images, WIDTH)
    seconds, processor = {}, {}

    def timed(name: str, work):
        clock, used = time.perf_counter(), time.process_time()
        result = work()
        seconds[name] = round(time.perf_counter() - clock, 1)
        processor[name] = round(time.process_time() - used, 1)
        print(f"{name}: {seconds[name]} s, {processor[name]} s of processors", flush=True)
        return result

    def of_heads(score):
        return [score(classes, own) for own in aligned]

    with AnonymousPeak() as memory:
        alignment = timed("alignment", lambda: ensemble.align_heads(labels, CLUSTERS, 0))
        aligned = ensemble.relabel(labels, alignment)
        vote, _ = timed("vote", lambda: ensemble.vote(aligned, CLUSTERS, 0))
        timed("ACC of all heads", lambda: of_heads(cluster_accuracy))
        timed("NMI of all heads", lambda: of_heads(sklearn_metrics.normalized_mutual_info_score))
        timed("ARI of all heads", lambda: of_heads(sklearn_metrics.adjusted_rand_score))
        probs = ensemble.mean_probs(heads, x, alignment, 0.1)
        timed("soft consensus", lambda: [chunk.max(dim=1) for chunk in probs])
        totals = {"seconds_without_anmi": round(sum(seconds.values()), 1),
                  "processor_seconds_without_anmi": round(sum(processor.values()), 1)}  # fmt: skip
        timed("ANMI of the vote", lambda: sklearn_metrics.adjusted_mutual_info_score(classes, vote))
    measured = {"seconds": seconds, "processor_seconds": processor}
    return measured | totals | {"peak_gb": round(memory.peak, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES)
    images = parser.parse_args().images
    results = {"images": images, "clusters": CLUSTERS, "heads": HEADS, **alone(reading, images)}
    results["conditions"] = {
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "numpy": np.__version__, "scikit-learn": sklearn.__version__,
    }  # fmt: skip
    print(results)
    write_json(FILE, results)


if __name__ == "__main__":
    main()
