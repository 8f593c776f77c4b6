"""What the heads know together: align their clusters, then vote."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from temi.heads import MultiHead


def align_heads(head_labels: np.ndarray, num_clusters: int, reference: int) -> np.ndarray:
    """Give all heads the same cluster numbers.

    Cluster 3 of one head is not cluster 3 of another. Each head's clusters are matched one-to-one
    with those of a reference so that most images agree (Hungarian matching of the table of
    counts). The reference is one head at first, then the vote of all aligned heads, until nothing
    changes.

    Parameters
    ----------
    head_labels : ndarray [H, N] of int
        Cluster of each image under each head.
    num_clusters : int
        K.
    reference : int
        Head whose numbers the others take; the one of the lowest loss is a good choice.

    Returns
    -------
    ndarray [H, K], int64
        ``alignment[h, c]`` is the common number of head h's cluster c.
    """
    target, alignment = head_labels[reference], None
    for _ in range(10):  # settles in two or three rounds
        updated = np.stack([_match(labels, target, num_clusters) for labels in head_labels])
        if alignment is not None and (updated == alignment).all():
            break
        alignment = updated
        target, _ = vote(relabel(head_labels, alignment), num_clusters, reference)
    return alignment


def _match(labels: np.ndarray, target: np.ndarray, num_clusters: int) -> np.ndarray:
    counts = np.bincount(labels * num_clusters + target, minlength=num_clusters**2)
    return linear_sum_assignment(counts.reshape(num_clusters, -1), maximize=True)[1]


def relabel(head_labels: np.ndarray, alignment: np.ndarray) -> np.ndarray:
    """Replace each head's cluster numbers [H, N] by the common ones of ``alignment`` [H, K]."""
    return np.take_along_axis(alignment, head_labels, axis=1)


def vote(
    aligned_labels: np.ndarray, num_clusters: int, reference: int
) -> tuple[np.ndarray, np.ndarray]:
    """Majority vote of aligned heads.

    A tie goes to the cluster that the reference head chose if that is among the tied, else to the
    lowest number. A cluster that wins no image stays empty.

    Parameters
    ----------
    aligned_labels : ndarray [H, N] of int
        Cluster of each image under each head, in common numbers.
    num_clusters : int
        K.
    reference : int
        Head that breaks ties.

    Returns
    -------
    labels : ndarray [N], int64
    agreement : ndarray [N], float64
        Share of heads that voted with the winner, 1 / H to 1.
    """
    images = np.arange(aligned_labels.shape[1])
    votes = np.zeros((len(images), num_clusters), dtype=np.float32)
    for labels in aligned_labels:
        votes[images, labels] += 1
    votes[images, aligned_labels[reference]] += 0.5  # decides ties and nothing else
    winners = votes.argmax(axis=1)
    return winners, (aligned_labels == winners).mean(axis=0)


def agreement_between_heads(aligned_labels: np.ndarray) -> np.ndarray:
    """Share of images [H, H] that each pair of aligned heads puts into the same cluster."""
    return np.stack([(aligned_labels == labels).mean(axis=1) for labels in aligned_labels])


def head_logits(heads: MultiHead, x: Tensor, chunk_size: int = 4096) -> Iterator[Tensor]:
    """Logits [H, chunk, K] of embeddings [N, D], some rows at a time, on the heads' device."""
    with torch.inference_mode():
        for chunk in x.split(chunk_size):
            yield heads(chunk.to(heads.gain.device))


def head_labels(heads: MultiHead, x: Tensor) -> np.ndarray:
    """Cluster [H, N] of each embedding [N, D] under each head, in each head's own numbers."""
    return torch.cat([logits.argmax(-1).cpu() for logits in head_logits(heads, x)], dim=1).numpy()
