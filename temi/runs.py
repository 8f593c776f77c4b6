"""A run: what it predicts, and how it is read back."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from temi import checkpoints, ensemble
from temi.config import TrainConfig
from temi.data import ImageSet
from temi.embeddings import Features, as_array, check_same_backbone
from temi.files import readable_path
from temi.heads import MultiHead
from temi.rows import Rows, rows_on_demand


@dataclass(frozen=True)
class Run:
    """A trained ensemble of heads: its clusters of the images trained on, and of new ones.

    Attributes
    ----------
    config : TrainConfig
    manifest : dict
        Where the embeddings trained on come from; see :class:`temi.Features`.
    teacher : MultiHead
        What is asked for clusters.
    mean : ndarray [D]
        Subtracted from embeddings before the heads; see :func:`temi.embeddings.normalize`.
    axes : ndarray [D, P], or None
        Principal axes that are kept of them, where ``pca_dim`` leaves any out.
    head_losses : ndarray [H]
        Mean loss of each head over the last epoch.
    alignment : ndarray [H, K]
        Each head's clusters in common numbers; see :func:`temi.align_heads`.
    head_labels : ndarray [H, N], int16, or int32 of more than 32,768 clusters
        Cluster of each training image under each head, in common numbers.
    labels : ndarray [N]
        Majority vote: the reported clusters of the training images.
    agreement : ndarray [N]
        Share of heads that voted with the winner.
    history : list of dict
        One entry an epoch: ``epoch`` (from 1), ``head_losses`` and ``gradient_norm`` (means over
        the steps, the norm before clipping), ``learning_rate`` of the last step,
        ``marginal_entropy`` in nats (mean over heads), ``collapsed_heads``, ``seconds``. Where
        labels exist, also accuracies of the labels that the teachers gave while the epoch ran; in
        the last, of the final ones.
    retries : list of dict
        One entry for each time the training went back: the ``entry`` of its
        :class:`temi.trouble.DivergenceError`.
    seconds : dict
        Wall time of each stage.
    """

    config: TrainConfig
    manifest: dict
    teacher: MultiHead
    mean: np.ndarray
    axes: np.ndarray | None
    head_losses: np.ndarray
    alignment: np.ndarray
    head_labels: np.ndarray
    labels: np.ndarray
    agreement: np.ndarray
    history: list[dict]
    retries: list[dict]
    seconds: dict[str, float]

    @classmethod
    def from_heads(
        cls,
        config: TrainConfig,
        manifest: dict,
        teacher: MultiHead,
        mean: np.ndarray,
        axes: np.ndarray | None,
        own_labels: np.ndarray,
        history: list[dict],
        retries: list[dict],
        seconds: dict[str, float],
    ) -> "Run":
        """Align the heads, given their clusters [H, N] in each head's own numbers, and vote."""
        clusters = config.num_clusters
        head_losses = np.array(history[-1]["head_losses"] if history else [0.0] * len(own_labels))
        best = int(head_losses.argmin())
        alignment = ensemble.align_heads(own_labels, clusters, best)
        aligned = ensemble.relabel(own_labels, alignment)
        voted = ensemble.vote(aligned, clusters, best)
        seconds = seconds | {"training": sum(entry["seconds"] for entry in history)}
        return cls(
            config, manifest, teacher, mean, axes, head_losses, alignment, aligned, *voted,
            history, retries, seconds,
        )  # fmt: skip

    @property
    def best_head(self) -> int:
        """The head of the lowest loss; chosen without labels."""
        return int(self.head_losses.argmin())

    def predict_heads(self, features: Features | np.ndarray | Rows) -> np.ndarray:
        """Cluster of each row of embeddings under each head, in common numbers.

        Parameters
        ----------
        features : Features or ndarray [N, D], or Rows
            As for :meth:`predict`.

        Returns
        -------
        ndarray [H, N], int16 (int32 of more than 32,768 clusters)
        """
        labels = ensemble.head_labels(self.teacher, self.input_rows(features))
        return ensemble.relabel(labels, self.alignment)

    def predict(
        self, features: Features | np.ndarray | Rows | ImageSet | str | Path, **options
    ) -> "np.ndarray | pd.DataFrame":
        """Cluster of each row of embeddings, or of each image of a folder, by majority vote.

        Parameters
        ----------
        features : Features or ndarray [N, D], or Rows, or ImageSet or path
            From the same backbone as those trained on, not normalised; they need not fit in memory.
            Or what :meth:`input_rows` made of them. Or images, or their folder (or the name of a
            data set), which are embedded as the run's own images were.
        **options
            With images: of :func:`temi.predict_images`.

        Returns
        -------
        ndarray [N], int64, or DataFrame
            The latter with images; its columns are those of :func:`temi.predict_images`.
        """
        if isinstance(features, (ImageSet, str, Path)):
            from temi.prediction import predict_images  # which builds on this module

            return predict_images(self, features, **options)
        if options:
            raise TypeError(f"predict() takes {', '.join(options)} with images alone")
        return self.vote(features)[0]

    def vote(self, features: Features | np.ndarray | Rows) -> tuple[np.ndarray, np.ndarray]:
        """Cluster of each row of embeddings, and how many heads are behind it.

        Parameters
        ----------
        features : Features or ndarray [N, D], or Rows
            As for :meth:`predict`.

        Returns
        -------
        labels : ndarray [N], int64
        agreement : ndarray [N], float64
            Share of heads, 1 / H to 1.
        """
        heads = self.predict_heads(features)
        return ensemble.vote(heads, self.config.num_clusters, self.best_head)

    def predict_proba(self, features: Features | np.ndarray | Rows) -> np.ndarray:
        """Mean over heads of the aligned teacher probabilities.

        Parameters
        ----------
        features : Features or ndarray [N, D], or Rows
            As for :meth:`predict`.

        Returns
        -------
        ndarray [N, K], of the teacher's dtype
        """
        return torch.cat(list(self.mean_probs(features))).numpy()

    def soft_consensus(
        self, features: Features | np.ndarray | Rows, weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cluster of each row of embeddings by the mean of all heads' probabilities.

        Parameters
        ----------
        features : Features or ndarray [N, D], or Rows
            As for :meth:`predict`.
        weights : ndarray [H], optional
            Of the heads, such as :func:`temi.loss_weights`; None: equal.

        Returns
        -------
        labels : ndarray [N], int64
        confidence : ndarray [N], of the teacher's dtype
            Mean probability of that cluster.

        Raises
        ------
        ValueError
            If the weights are not one finite number from 0 on for each head, or all are 0.
        """
        chunks = [probs.max(dim=-1) for probs in self.mean_probs(features, weights)]
        labels = torch.cat([chunk.indices for chunk in chunks]).numpy()
        return labels, torch.cat([chunk.values for chunk in chunks]).numpy()

    def mean_probs(
        self, features: Features | np.ndarray | Rows, weights: np.ndarray | None = None
    ) -> Iterator[Tensor]:
        """What :meth:`predict_proba` gives, some images at a time.

        Parameters
        ----------
        features : Features or ndarray [N, D], or Rows
            As for :meth:`predict`.
        weights : ndarray [H], optional
            Of the heads; None: equal.

        Yields
        ------
        Tensor [chunk, K]
        """
        x = cast(Tensor, self.input_rows(features))  # which Rows stand for
        temperature = self.config.teacher_temp
        return ensemble.mean_probs(self.teacher, x, self.alignment, temperature, weights)

    def inputs(self, features: Features | np.ndarray) -> Tensor:
        """Rows of embeddings as the heads see them: normalised, and projected.

        Parameters
        ----------
        features : Features or ndarray [N, D]
            As for :meth:`predict`.

        Returns
        -------
        Tensor [N, D], or [N, P] with P principal components

        Raises
        ------
        ValueError
            If the rows are not as wide as those trained on, or not finite.
        """
        return self.input_rows(features).read(slice(None))

    def input_rows(self, features: Features | np.ndarray | Rows) -> Rows:
        """What :meth:`inputs` gives, made some rows at a time when they are asked for.

        Of embeddings in a file, such as :func:`temi.embed` gives, little is in memory at once.

        Parameters
        ----------
        features : Features or ndarray [N, D], or Rows
            As for :meth:`predict`; Rows are returned as they are.

        Returns
        -------
        Rows [N, D], or [N, P]
            ``rows.split(size)`` gives them all, ``size`` at a time, on the CPU.

        Raises
        ------
        ValueError
            As for :meth:`inputs`; or they are of another backbone, by their manifests.
        """
        if isinstance(features, Rows):
            return features
        if isinstance(features, Features):
            check_same_backbone(features.manifest, self.manifest)
        dtype = "float64" if self.teacher.gain.dtype == torch.float64 else "float32"
        x = as_array(features)
        if x.shape[1] != len(self.mean):
            raise ValueError(
                f"embeddings of {x.shape[1]} numbers: the run was trained on {len(self.mean)} an "
                "image, of one backbone and size"
            )
        return rows_on_demand(x, self.config.normalize, self.mean, self.axes, dtype=dtype)


def load_run(path: str | Path) -> Run:
    """Read a run back.

    Parameters
    ----------
    path : path
        A run directory, of a finished run or of one that is not (its newest whole checkpoint is
        taken); or a checkpoint. Relative to the current folder, else to :func:`temi.files.home`.

    Returns
    -------
    Run
        Ready to predict, on the CPU. The labels of a finished run are those that it reported.

    Raises
    ------
    ValueError
        If there is no such run, or no checkpoint of it is whole.
    """
    found = readable_path(path)
    if not found.exists():
        raise ValueError(f"path={str(path)!r}: there is no such run directory or checkpoint")
    if found.is_file():
        content = checkpoints.load(found)
    elif newest := checkpoints.newest(found / checkpoints.FOLDER):
        _, content = newest
    else:
        raise ValueError(f"path={str(path)!r}: holds no checkpoint")
    settings = {key: value for key, value in content["config"].items()
                if key not in ("dataset", "backbone", "device", "precision")}  # fmt: skip
    config = TrainConfig(**settings)
    heads, hidden_dim, in_dim = content["teacher"]["weight1"].shape
    _, bottleneck_dim, _ = content["teacher"]["weight2"].shape
    teacher = MultiHead(in_dim, config.num_clusters, heads, hidden_dim, bottleneck_dim)
    teacher.load_state_dict(content["teacher"])
    axes = None if content["axes"] is None else content["axes"].numpy()
    labels = content["labels"].numpy()
    return Run.from_heads(
        config, content["manifest"], teacher.requires_grad_(False), content["mean"].numpy(), axes,
        labels, content["history"], content["retries"], {},
    )  # fmt: skip
