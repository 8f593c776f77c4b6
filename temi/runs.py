"""A finished run: what it predicts, and the directory that records it."""

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from temi import ensemble
from temi.baselines import kmeans
from temi.config import TrainConfig
from temi.data import ImageSet
from temi.embeddings import Features, as_array, normalize
from temi.files import home, path_part, write_json, write_whole
from temi.heads import MultiHead
from temi.metrics import SCORES, cluster_statistics, evaluate
from temi.parameters import JobConfig

RESULTS = "final_results.json"
SETTINGS = "config.json"


@dataclass(frozen=True)
class Run:
    """A trained ensemble of heads: its clusters of the images trained on, and of new ones.

    Attributes
    ----------
    config : TrainConfig
    teacher : MultiHead
        What is asked for clusters.
    mean : ndarray [D]
        Subtracted from embeddings before the heads; see :func:`temi.embeddings.normalize`.
    head_losses : ndarray [H]
        Mean loss of each head over the last epoch.
    alignment : ndarray [H, K]
        Each head's clusters in common numbers; see :func:`temi.ensemble.align_heads`.
    head_labels : ndarray [H, N]
        Cluster of each training image under each head, in common numbers.
    labels : ndarray [N]
        Majority vote: the reported clusters of the training images.
    agreement : ndarray [N]
        Share of heads that voted with the winner.
    history : list of dict
        One entry an epoch; see :func:`temi.training.train_epoch`.
    seconds : dict
        Wall time of each stage.
    """

    config: TrainConfig
    teacher: MultiHead
    mean: np.ndarray
    head_losses: np.ndarray
    alignment: np.ndarray
    head_labels: np.ndarray
    labels: np.ndarray
    agreement: np.ndarray
    history: list[dict]
    seconds: dict[str, float]

    @property
    def best_head(self) -> int:
        """The head of the lowest loss; chosen without labels."""
        return int(self.head_losses.argmin())

    def predict_heads(self, features: Features | np.ndarray) -> np.ndarray:
        """Cluster of each row of embeddings [N, D] under each head [H, N], in common numbers."""
        labels = ensemble.head_labels(self.teacher, self._inputs(features))
        return ensemble.relabel(labels, self.alignment)

    def predict(self, features: Features | np.ndarray) -> np.ndarray:
        """Cluster of each row of embeddings, by majority vote of the heads.

        Parameters
        ----------
        features : Features or ndarray [N, D]
            From the same backbone as those trained on, not normalised.

        Returns
        -------
        ndarray [N], int64
        """
        heads = self.predict_heads(features)
        return ensemble.vote(heads, self.config.num_clusters, self.best_head)[0]

    def predict_proba(self, features: Features | np.ndarray) -> np.ndarray:
        """Mean over heads of the aligned teacher probabilities [N, K], float32."""
        own_number = torch.from_numpy(self.alignment.argsort(axis=1))  # (H, K), of a common number
        chunks = []
        for logits in ensemble.head_logits(self.teacher, self._inputs(features)):
            probs = (logits / self.config.teacher_temp).softmax(dim=-1).cpu()  # (H, chunk, K)
            index = own_number.unsqueeze(1).expand_as(probs)
            chunks.append(probs.gather(-1, index).mean(dim=0))
        return torch.cat(chunks).numpy()

    def _inputs(self, features: Features | np.ndarray) -> Tensor:
        return torch.from_numpy(normalize(as_array(features), self.config.normalize, self.mean))


def plan_run(
    job: JobConfig, config: TrainConfig, data: ImageSet | Features
) -> tuple[TrainConfig, Path]:
    """Hold a job against its data and its run directory, before any work.

    Parameters
    ----------
    job : JobConfig
    config : TrainConfig
    data : ImageSet or Features
        What ``job.load()`` gave.

    Returns
    -------
    TrainConfig
        With the number of clusters.
    Path
        ``job.run_dir``, a relative one below :func:`temi.files.home`; else
        :func:`default_run_dir`.

    Raises
    ------
    ValueError
        See :meth:`temi.TrainConfig.resolve` and :func:`check_run_dir`.
    """
    run_dir = default_run_dir(job.dataset, job.backbone, config)
    if job.run_dir is not None:
        run_dir = home() / job.run_dir
    config = config.resolve(len(data), data.num_classes)
    check_run_dir(run_dir, run_settings(job.dataset, job.backbone, config), job.overwrite)
    return config, run_dir


def default_run_dir(dataset: str, backbone: str, config: TrainConfig) -> Path:
    """``runs/DATASET-BACKBONE``, followed by the settings that differ from the recipe.

    Parameters
    ----------
    dataset, backbone : str
    config : TrainConfig
        As given, before :meth:`temi.TrainConfig.resolve`: a number of clusters counts as different.

    Returns
    -------
    Path
        Below :func:`temi.files.home`.
    """
    parts = [path_part(dataset), path_part(backbone)]
    parts += [config.recipe] * (config.recipe != "fast")
    parts += [path_part(f"{name}{value}".lower()) for name, value in config.changes().items()]
    return home() / "runs" / "-".join(parts)


def check_run_dir(run_dir: Path, settings: dict, overwrite: bool) -> None:
    """Make sure that saving to ``run_dir`` will destroy nothing that is wanted.

    Parameters
    ----------
    run_dir : Path
    settings : dict
        From :func:`run_settings`.
    overwrite : bool
        Whether a run of other settings may be replaced.

    Raises
    ------
    ValueError
        If the directory holds a run of other settings and ``overwrite`` is False, or holds
        something else than a run.
    """
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if not (run_dir / SETTINGS).exists():
        raise ValueError(f"run_dir={str(run_dir)!r}: holds files but no run; give another run_dir")
    before = json.loads((run_dir / SETTINGS).read_text())
    differing = [f"{key}={before.get(key)!r} (now {value!r})" for key, value in settings.items()
                 if before.get(key) != value and key != "device"]  # fmt: skip
    if differing and not overwrite:
        raise ValueError(
            f"run_dir={str(run_dir)!r}: holds a run with {', '.join(differing)}; "
            "give overwrite=True or another run_dir"
        )


def run_settings(dataset: str, backbone: str, config: TrainConfig) -> dict:
    """What config.json records: data, backbone and every setting of the training."""
    return {"dataset": dataset, "backbone": backbone, **asdict(config)}


def save_run(run: Run, run_dir: Path, features: Features, images: ImageSet | None = None) -> dict:
    """Write a run's directory, whole or not at all, in the place of an earlier one.

    It holds ``config.json``, ``final_results.json``, ``assignments.csv`` (image, cluster,
    agreement) and, given images, ``clusters.png``.

    Parameters
    ----------
    run : Run
    run_dir : Path
    features : Features
        Those that were trained on.
    images : ImageSet, optional
        For the pictures.

    Returns
    -------
    dict
        The content of ``final_results.json``.
    """
    results = final_results(run, features)
    part, old = (run_dir.with_name(f".{run_dir.name}.{what}") for what in ("part", "old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    write_json(part / SETTINGS, run_settings(features.dataset, features.backbone, run.config))
    write_json(part / RESULTS, results)
    table = {"id": features.ids, "cluster": run.labels, "agreement": run.agreement}
    write_whole(part / "assignments.csv", pd.DataFrame(table).to_csv(index=False))
    if images is not None:
        from temi.plots import cluster_rows

        cluster_rows(images.images, run.labels, run.agreement).savefig(part / "clusters.png")
    if run_dir.exists():
        run_dir.rename(old)
    part.rename(run_dir)
    shutil.rmtree(old, ignore_errors=True)
    return results


def summary(run_dir: str | Path) -> str:
    """The four scores of a finished run, and where its files are, in a few lines."""
    folder = home() / run_dir
    results = json.loads((folder / RESULTS).read_text())
    table = pd.DataFrame(
        {"TEMI, vote of all heads": results["metrics"]}
        | {f"k-means, {how}": scores for how, scores in results["kmeans"].items()}
    )
    files = [str(Path(run_dir) / name) for name in sorted(p.name for p in folder.iterdir())]
    return "\n".join([table.T.round(3).to_string(), *files])


def final_results(run: Run, features: Features) -> dict:
    """Scores, history and provenance of a run.

    Parameters
    ----------
    run : Run
    features : Features
        Those that were trained on. Their labels score alone; without them every score is None.

    Returns
    -------
    dict
        ``metrics`` of the reported labels (the vote); ``per_head``, ``mean_head``, ``best_head``
        (lowest loss), ``ensemble``, ``kmeans`` (on the embeddings as they are, and centred and
        L2-normalised), ``cluster_statistics``, ``history``, ``config``, ``provenance``.
    """

    classes = features.labels

    def score(labels: np.ndarray) -> dict:
        return dict.fromkeys(SCORES) if classes is None else evaluate(labels, classes)

    config = run.config
    per_head = [
        {"loss": float(loss), **score(labels)}
        for loss, labels in zip(run.head_losses, run.head_labels, strict=True)
    ]
    mean_head = pd.DataFrame(per_head).astype(float).mean()
    scores = score(run.labels)
    return {
        "metrics": scores,
        "per_head": per_head,
        "mean_head": mean_head.replace(np.nan, None).to_dict(),
        "best_head": {"head": run.best_head, **per_head[run.best_head]},
        "ensemble": {**scores, "mean_agreement": float(run.agreement.mean())},
        "kmeans": {
            how: score(kmeans(features.x, config.num_clusters, how, config.seed))
            for how in ("none", "center-l2")
        },
        "cluster_statistics": cluster_statistics(run.labels, config.num_clusters),
        "history": run.history,
        "config": run_settings(features.dataset, features.backbone, config),
        "provenance": {
            "features": features.manifest,
            "seed": config.seed,
            "device": str(run.teacher.gain.device),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("temi", "torch", "numpy", "scikit-learn")},
            "seconds": run.seconds,
            "command": _command(features, config),
        },
    }


def _command(features: Features, config: TrainConfig) -> str:
    job = {"dataset": features.dataset, "backbone": features.backbone, "recipe": config.recipe}
    options = " ".join(f"-p {name} {value}" for name, value in (job | config.changes()).items())
    return f"papermill notebooks/05_train.ipynb out.ipynb {options}"
