"""What benchmarks/time_to_accuracy.py sees on the way of a training, and makes of it."""

import dataclasses

import pytest
import torch
from sklearn.datasets import make_blobs

import temi
from benchmarks.time_to_accuracy import passes, run_ours, summary

BLOBS, CLASSES = make_blobs(240, 8, centers=4, cluster_std=3.0, random_state=0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_training_that_is_looked_at_is_the_one_that_is_timed(device):
    config = temi.TrainConfig(
        num_clusters=4, num_heads=3, epochs=3, batch_size=40, device=device, precision="fp32"
    )
    x = BLOBS.astype("float32")
    found = run_ours(x, CLASSES, config, 3)  # of six steps in an epoch
    trace = found["trace"]
    assert [point["epoch"] for point in trace] == [round(n / 3, 3) for n in range(1, 10)]
    seconds = [point["seconds"] for point in trace]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= found["whole_seconds"]
    whole = temi.train(x, config, progress=False)
    for part, epochs in ((2, 1), (5, 2), (8, 3)):
        run = temi.train(x, dataclasses.replace(config, epochs=epochs), progress=False)
        reached = temi.evaluate(run.labels, CLASSES)
        assert trace[part]["vote_acc"] == pytest.approx(reached["acc"], abs=1e-4)
        assert trace[part]["vote_nmi"] == pytest.approx(reached["nmi"], abs=1e-4)
    best = temi.evaluate(whole.head_labels[whole.best_head], CLASSES)
    assert trace[-1]["head_acc"] == pytest.approx(best["acc"], abs=1e-4)


def test_what_is_passed_has_to_be_kept():
    def after(*accuracies: float) -> float | None:
        trace = [{"seconds": 10 * n, "vote_acc": acc} for n, acc in enumerate(accuracies, 1)]
        return passes(trace, 0.5)

    assert after(0.5, 0.6) == 10
    assert after(0.4, 0.6, 0.4, 0.5) == 40
    assert after(0.7, 0.4) is None


def test_the_summary_is_of_all_seeds():
    def run(seconds: float, *points: tuple[float, float]) -> dict:
        trace = [{"seconds": s, "vote_acc": acc, "vote_nmi": acc / 2} for s, acc in points]
        return {"whole_seconds": seconds, "trace": trace}

    def plain(epoch: int, seconds: float, acc: float) -> dict:
        return {"trace": [{"epoch": epoch, "seconds": seconds, "head_acc": acc}]}

    results = {
        "plain": [plain(100, 800.0, 0.52), plain(100, 840.0, 0.48)],
        "kmeans": {"none": {"acc": 0.3}, "center-l2": {"acc": 0.4}},
        "fast": [run(20, (5, 0.4), (10, 0.6)), run(30, (6, 0.5), (12, 0.7))],
    }
    found = summary(results)
    assert found == {
        "plain_seconds": 800.0, "plain_head_acc": 0.5,
        "fast_passes_after_seconds": [10, 6], "passing_ratio": 100,
        "fast_whole_seconds": 25, "whole_ratio": 32,
        "fast_vote_acc": "0.6500 +- 0.0707", "fast_vote_nmi": 0.325,
        "above_plain": 0.15, "above_kmeans": 0.25,
    }  # fmt: skip
    # a baseline that was cut short after a tenth, with an end that it has not reached itself
    results["plain"] = [plain(10, 80.0, 0.1)]
    assert summary(results | {"goal": 0.65}) == found | {
        "plain_head_acc": 0.65, "above_plain": 0.0,
        "fast_passes_after_seconds": [None, 12], "passing_ratio": None,
    }  # fmt: skip
