"""What a run's ``final_results.json`` says."""

import functools
import platform
import shlex
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from temi import distributed
from temi.baselines import kmeans
from temi.config import TrainConfig
from temi.data import BOTH, SPLITS, holds_embeddings
from temi.devices import uses_bf16
from temi.embeddings import Features, spaces_of
from temi.metrics import SCORES, cluster_accuracy, cluster_statistics, evaluate
from temi.runs import Run

BASELINES = ("none", "center-l2")  # what is done to the embeddings before k-means
# Images x clusters x dimensions. Of 25,000 x 100 x 1,280 both take 196 s on two cores
# (results/benchmarks/time_to_accuracy_tiny.json).
AFFORDABLE = 4 * 10**9
NOTICED = 2 * 10**7  # about a second


def accuracies(run: Run, classes: np.ndarray) -> dict[str, float]:
    """Accuracies after an epoch, for the history alone."""
    of_heads = [cluster_accuracy(labels, classes) for labels in run.head_labels]
    return {
        "mean_head_acc": float(np.mean(of_heads)),
        "best_head_acc": of_heads[run.best_head],
        "ensemble_acc": cluster_accuracy(run.labels, classes),
    }


def best_epoch(history: list[dict], best_by: str) -> tuple[int, float]:
    """The best epoch so far (from 1), the first of equals, and the number that made it the best."""
    if best_by == "loss":
        values = [min(entry["head_losses"]) for entry in history]
        epoch = int(np.argmin(values))
    else:
        if not all("ensemble_acc" in entry for entry in history):
            raise ValueError(
                "best_by='accuracy': the run began without labels; 'loss' is allowed to go on"
            )
        values = [entry["ensemble_acc"] for entry in history]
        epoch = int(np.argmax(values))
    return epoch + 1, values[epoch]


def final_results(
    run: Run,
    features: Features,
    *,
    best_by: str = "loss",
    finished: bool = True,
    neighbors: str | None = None,
    baseline: str = "auto",
) -> dict:
    """Scores, history and provenance of a run, as ``final_results.schema.json`` describes them.

    Parameters
    ----------
    run : Run
    features : Features
        Those that were trained on. Their labels score alone; without them every score is None.
    best_by : {"loss", "accuracy"}
        How ``checkpoint_best.pth`` was chosen.
    finished : bool
        False while the run still trains: then every score is None, as without labels.
    neighbors : str, optional
        Checksum of the neighbours, where they were given: then no command repeats the run.
    baseline : {"auto", "always", "never"}
        Whether k-means is computed: see :class:`temi.RunOptions`. If not, its scores are None.

    Returns
    -------
    dict
        ``metrics`` of the reported labels (the vote); ``per_head``, ``mean_head``, ``best_head``
        (lowest loss), ``ensemble``, ``kmeans`` (on the embeddings as they are, and centred and
        L2-normalised), ``cluster_statistics``, ``history``, ``retries``, ``best_checkpoint``,
        ``config``, ``provenance``, ``finished``.
    """
    classes = features.labels if finished else None
    config, device = run.config, run.teacher.gain.device
    size = config.num_clusters * features.x.size
    with_kmeans = classes is not None and (
        baseline == "always" or (baseline == "auto" and size <= AFFORDABLE)
    )
    unknown = dict.fromkeys(SCORES)
    bar = tqdm(
        total=len(run.head_labels) + 1 + len(BASELINES) * with_kmeans, desc="scoring",
        file=sys.stdout, disable=classes is None or size < NOTICED,
    )  # fmt: skip

    def score(labels: np.ndarray) -> dict:
        scores = unknown if classes is None else evaluate(labels, classes)
        bar.update()
        return scores

    def score_kmeans(how: str) -> dict:
        bar.set_postfix_str("k-means, to compare with")
        return score(kmeans(features.x, config.num_clusters, how, config.seed))

    with bar:
        per_head = [
            {"loss": float(loss), **score(labels)}
            for loss, labels in zip(run.head_losses, run.head_labels, strict=True)
        ]
        scores = score(run.labels)
        of_kmeans = {how: score_kmeans(how) if with_kmeans else unknown for how in BASELINES}
    if classes is not None and baseline == "auto" and not with_kmeans:
        count, dim = features.x.shape
        tqdm.write(
            f"k-means, to compare with, is left out: {count} images x {config.num_clusters} "
            f"clusters x {dim} dimensions are more than {AFFORDABLE}; baseline='always' computes "
            "it",
            file=sys.stdout,
        )
    mean_head = pd.DataFrame(per_head).astype(float).mean()
    epoch, value = best_epoch(run.history, best_by)
    return {
        "finished": finished,
        "metrics": scores,
        "per_head": per_head,
        "mean_head": mean_head.replace(np.nan, None).to_dict(),
        "best_head": {"head": run.best_head, **per_head[run.best_head]},
        "ensemble": {**scores, "mean_agreement": float(run.agreement.mean())},
        "kmeans": of_kmeans,
        "cluster_statistics": cluster_statistics(run.labels, config.num_clusters),
        "history": run.history,
        "retries": run.retries,
        "best_checkpoint": {
            "chosen_by": best_by,
            "labels_used": best_by == "accuracy",
            "epoch": epoch,
            "value": value,
        },
        "config": run_settings(features.dataset, features.backbone, config),
        "provenance": {
            "features": features.manifest,
            "seed": config.seed,
            "device": str(device),
            "precision": "bf16" if uses_bf16(config.precision, device) else "fp32",
            "threads": torch.get_num_threads(),
            "processes": distributed.processes(),
            "machine": platform.machine(),
            "versions": _versions(),
            "seconds": run.seconds,
            "neighbors": neighbors,
            "command": None if neighbors else _command(run, features),
        },
    }


@functools.cache
def _versions() -> dict[str, str]:
    packages = ("temi", "torch", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def run_settings(dataset: str, backbone: str, config: TrainConfig) -> dict:
    """What config.json records: data, backbone and every setting of the training."""
    return {"dataset": dataset, "backbone": backbone, **asdict(config)}


def _source(features: Features) -> dict:
    """What a job must be told to embed the same images in the same way, by their manifest."""
    name, _, split = features.dataset.rpartition("-")
    source = {"dataset": features.dataset, "backbone": features.backbone}
    if split in SPLITS.get(name, ()):
        source |= {"dataset": name, "split": split}
    elif features.dataset not in SPLITS and features.labels is not None:
        source["labels"] = "folders"
    folder = Path(source["dataset"])
    if folder.name == BOTH and not folder.exists():
        source |= {"dataset": str(folder.parent), "split": "both"}
    first = spaces_of(features.manifest)[0]
    given = {"image_size": first.get("image_size"), "weights": first.get("weights_file")}
    return source | {key: value for key, value in given.items() if value is not None}


def _command(run: Run, features: Features) -> str | None:
    """What repeats the run; None where no command finds its images or embeddings."""
    from_file = holds_embeddings(features.dataset)
    if features.backbone == "own" and not from_file:
        return None
    job = features.manifest.get("job")
    if job is None:  # embedded in Python
        job = {"dataset": features.dataset} if from_file else _source(features)
        if not (from_file or job["dataset"] in SPLITS or Path(job["dataset"]).is_dir()):
            return None
    job = job | {"recipe": run.config.recipe} | run.config.changes()
    job |= {"on_divergence": "retry"} if run.retries else {}
    words = ["python", "-m", "temi", "train", job.pop("dataset")]
    for name, value in job.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return shlex.join(words)
