"""What the heads know together: align their clusters, then vote."""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from temi import distributed
from temi.heads import MultiHead
from temi.rows import Rows

CHUNK = 1024  # images at a time where each has H x K or K numbers
LOGITS = 2**21  # of a chunk: 8 MB, which is faster than memory that is asked for anew each time


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
    Time is linear in N. No more than K x K counts stand in memory, where the tables of all pairs of
    heads would be a gigabyte for 16 heads of 1,000 clusters.
    """
    alignment = np.stack(
        [_match(_counts(labels, head_labels[reference], num_clusters)) for labels in head_labels]
    )  # (H, K)
    for _ in range(100):  # a handful does
        before = alignment.copy()
        for head, labels in enumerate(head_labels):
            with_others = np.zeros((num_clusters, num_clusters), dtype=np.int64)
            for other, theirs in enumerate(head_labels):
                if other != head:
                    with_others += _counts(labels, alignment[other][theirs], num_clusters)
            alignment[head] = _match(with_others)
        if (alignment == before).all():
            break
    return alignment


def _counts(labels: np.ndarray, others: np.ndarray, num_clusters: int) -> np.ndarray:
    """How many images have each pair of labels [K, K]."""
    pairs = np.bincount(labels.astype(np.int64) * num_clusters + others, minlength=num_clusters**2)
    return pairs.reshape(num_clusters, num_clusters)


def _match(counts: np.ndarray) -> np.ndarray:
    """Column of each row in the one-to-one matching of the largest sum."""
    return linear_sum_assignment(counts, maximize=True)[1]


def relabel(head_labels: np.ndarray, alignment: np.ndarray) -> np.ndarray:
    """Replace each head's cluster numbers [H, N] by the common ones of ``alignment`` [H, K].

    The result is of the dtype of ``head_labels``.
    """
    aligned = np.empty_like(head_labels)
    for common, labels, ours in zip(alignment, head_labels, aligned, strict=True):
        ours[:] = common[labels]
    return aligned


def vote(
    aligned_labels: np.ndarray,
    num_clusters: int,
    reference: int,
    weights: np.ndarray | None = None,
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
    weights : ndarray [H] of float, optional
        Votes of each head, such as :func:`loss_weights`; None: one each.

    Returns
    -------
    labels : ndarray [N], int64
    agreement : ndarray [N], float64
        Share of heads that voted with the winner, whatever their weights, 1 / H to 1.

    Raises
    ------
    ValueError
        If the weights are not one finite number from 0 on for each head, or all are 0.
    """
    weights = np.ones(len(aligned_labels)) if weights is None else np.asarray(weights)
    check_weights(weights, len(aligned_labels))
    winners = np.empty(aligned_labels.shape[1], dtype=np.int64)
    agreement = np.empty(len(winners))
    for start in range(0, len(winners), CHUNK):  # all N x K votes at once can be gigabytes
        chunk = aligned_labels[:, start : start + CHUNK]
        images = np.arange(chunk.shape[1])
        votes = np.zeros((len(images), num_clusters))
        for labels, weight in zip(chunk, weights, strict=True):
            votes[images, labels] += weight
        preferred = chunk[reference]
        tied = votes[images, preferred] >= votes.max(axis=1) - 1e-9 * weights.sum()
        won = np.where(tied, preferred, votes.argmax(axis=1))
        winners[start : start + CHUNK] = won
        agreement[start : start + CHUNK] = (chunk == won).mean(axis=0)
    return winners, agreement


def check_weights(weights: np.ndarray, heads: int) -> None:
    """Raise a ValueError unless there is a finite weight for each head, none below 0 nor all 0."""
    if weights.shape != (heads,):
        raise ValueError(f"weights of shape {weights.shape}: {(heads,)} is allowed, one a head")
    if not np.isfinite(weights).all() or weights.min() < 0 or not weights.any():
        raise ValueError(
            f"weights={weights.tolist()}: finite numbers from 0 on are allowed, not all of them 0"
        )


def loss_weights(head_losses: np.ndarray) -> np.ndarray:
    """Weights of heads by their losses: a head of lower loss counts for more.

    One standard deviation of the losses more is a factor of 1/e less, so that the weights do not
    depend on the scale of the losses, which differs with K and beta.

    Parameters
    ----------
    head_losses : array [H] of float

    Returns
    -------
    ndarray [H], float64
        Of mean 1.
    """
    losses = np.asarray(head_losses, dtype=np.float64)
    spread = losses.std() or 1.0
    weights = np.exp((losses.min() - losses) / spread)
    return weights / weights.mean()


def agreement_between_heads(aligned_labels: np.ndarray) -> np.ndarray:
    """Share of images that each pair of aligned heads puts into the same cluster.

    Parameters
    ----------
    aligned_labels : ndarray [H, N] of int
        Cluster of each image under each head, in common numbers.

    Returns
    -------
    ndarray [H, H], float64
    """
    return np.stack([(aligned_labels == labels).mean(axis=1) for labels in aligned_labels])


def head_logits(heads: MultiHead, x: Tensor | Rows) -> Iterator[Tensor]:
    """Logits [H, chunk, K] of embeddings [N, D], some rows at a time, on the heads' device."""
    rows = max(1, min(CHUNK, LOGITS // heads.gain.numel()))
    with distributed.image_bar(len(x), "asking the heads") as bar:
        for chunk in x.split(rows):
            with torch.inference_mode():  # left before the caller goes on, whose mode it would be
                logits = heads(chunk.to(heads.gain.device))
            yield logits
            bar.update(len(chunk))


def mean_probs(
    heads: MultiHead,
    x: Tensor,
    alignment: np.ndarray,
    temperature: float,
    weights: np.ndarray | None = None,
) -> Iterator[Tensor]:
    """Soft consensus: the mean over heads of their probabilities in common numbers.

    Parameters
    ----------
    heads : MultiHead
    x : Tensor [N, D], or Rows, which stand for one
    alignment : ndarray [H, K]
        From :func:`align_heads`.
    temperature : float
        Of the softmax.
    weights : ndarray [H], optional
        None: equal.

    Yields
    ------
    Tensor [chunk, K]
        On the CPU, some images at a time: all at once can be gigabytes.

    Raises
    ------
    ValueError
        If the weights are not one finite number from 0 on for each head, or all are 0.
    """
    own_number = torch.from_numpy(alignment.argsort(axis=1)).unsqueeze(1)  # (H, 1, K)
    weights = np.ones(len(alignment)) if weights is None else np.asarray(weights)
    check_weights(weights, len(alignment))
    shares = torch.from_numpy(weights / weights.sum()).to(x.dtype).view(-1, 1, 1)
    for logits in head_logits(heads, x):
        probs = (logits / temperature).softmax(dim=-1).cpu()  # (H, chunk, K)
        yield (probs.gather(-1, own_number.expand_as(probs)) * shares).sum(dim=0)


def head_labels(heads: MultiHead, x: Tensor | Rows) -> np.ndarray:
    """Cluster [H, N] of each embedding [N, D] under each head, in each head's own numbers.

    int16, or int32 of more than 32,768 clusters: of 10 million images and 16 heads 320 MB.
    """
    count, clusters = heads.gain.shape[:2]
    labels = torch.empty(count, len(x), dtype=torch.int16 if clusters <= 2**15 else torch.int32)
    start = 0
    for logits in head_logits(heads, x):  # (H, chunk, K)
        labels[:, start : start + logits.shape[1]] = logits.argmax(-1)
        start += logits.shape[1]
    return labels.numpy()
