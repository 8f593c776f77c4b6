"""What the heads know together: align their clusters, then vote."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from temi.heads import MultiHead


def align_heads(head_labels: np.ndarray, num_clusters: int, reference: int) -> np.ndarray:
    """Give all heads the same cluster numbers, so that they agree as much as they can.

    Cluster 3 of one head is not cluster 3 of another. All heads first take the numbers of a
    reference head, by Hungarian matching of the table of counts; then each in turn is matched with
    all the others together, which never lowers the agreement summed over pairs of heads, until
    nothing changes.

    Parameters
    ----------
    head_labels : ndarray [H, N] of int
        Cluster of each image under each head.
    num_clusters : int
        K.
    reference : int
        Head whose numbers the others take at first; the one of the lowest loss is a good choice.

    Returns
    -------
    ndarray [H, K], int64
        ``alignment[h, c]`` is the common number of head h's cluster c.

    Notes
    -----
    The images are read once, for the tables of counts between all pairs of heads: time is linear in
    N, memory H x H x K x K integers.
    """
    counts = np.array(
        [[_counts(head, other, num_clusters) for other in head_labels] for head in head_labels]
    )  # (H, H, K, K)
    alignment = np.stack([_match(table) for table in counts[:, reference]])  # (H, K)
    for _ in range(100):  # a handful does
        before = alignment.copy()
        for head, tables in enumerate(counts):
            own_numbers = alignment.argsort(axis=1)  # (H, K), of each common number
            with_others = np.take_along_axis(tables, own_numbers[:, None, :], axis=2).sum(axis=0)
            with_itself = tables[head][:, own_numbers[head]]
            alignment[head] = _match(with_others - with_itself)
        if (alignment == before).all():
            break
    return alignment


def _counts(labels: np.ndarray, others: np.ndarray, num_clusters: int) -> np.ndarray:
    """How many images have each pair of labels [K, K]."""
    pairs = np.bincount(labels * num_clusters + others, minlength=num_clusters**2)
    return pairs.reshape(num_clusters, num_clusters).astype(np.int32)


def _match(counts: np.ndarray) -> np.ndarray:
    """Column of each row in the one-to-one matching of the largest sum."""
    return linear_sum_assignment(counts, maximize=True)[1]


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
