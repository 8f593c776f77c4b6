"""The TEMI objective, the two simpler objectives that it grew from, and SCAN's for comparison.

The chapter "From mutual information to TEMI" derives them; the paper is Adaloglou et al.,
"Exploring the Limits of Deep Image Clustering using Pretrained Models", BMVC 2023.
"""

import torch
from torch import Tensor

from temi import distributed

SCAN_ENTROPY = 5.0  # weight of the entropy in the published settings of SCAN


def update_marginal(marginal: Tensor, teacher_probs: Tensor, momentum: float = 0.9) -> Tensor:
    """Running estimate of how often the teacher uses each cluster.

    Parameters
    ----------
    marginal : Tensor [H, K]
        Estimate before this batch; it starts uniform, 1 / K.
    teacher_probs : Tensor [H, 2B, K]
        Teacher probabilities of both views. Where several processes share a batch, of this one's
        part: the estimate is that of the whole batch.
    momentum : float
        Share of the old estimate that is kept.

    Returns
    -------
    Tensor [H, K]
        New estimate, floored at the smallest normal number of its dtype: a cluster that no image
        uses would otherwise reach zero and make the loss infinite.
    """
    batch_mean = distributed.mean(teacher_probs.mean(dim=1)).to(marginal.dtype)  # (H, K)
    updated = momentum * marginal + (1 - momentum) * batch_mean
    return updated.clamp_min(torch.finfo(marginal.dtype).tiny)


def pair_weights(probs: Tensor, partner_probs: Tensor) -> Tensor:
    """Probability, under each head's teacher, that the two images of a pair share a cluster.

    Parameters
    ----------
    probs, partner_probs : Tensor [H, B, K]
        Teacher probabilities of the one and of the other image of each pair.

    Returns
    -------
    Tensor [H, B]
        Values in (0, 1]; their mean over heads is TEMI's w(x, x').
    """
    return (probs * partner_probs).sum(dim=-1)


def temi_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    marginal: Tensor,
    *,
    beta: float = 0.6,
    student_temp: float = 0.1,
    teacher_temp: float | Tensor = 0.1,
    loss: str = "temi",
    group_size: int = 2,
) -> tuple[Tensor, Tensor]:
    r"""Loss of each head on a batch of pairs, and the marginals used for it.

    For a pair (x, x') and the direction in which the student sees x and the teacher x',

    .. math:: -w(x, x') \log \sum_c
              \frac{\left[p_s(c \mid x)\, p_t(c \mid x')\right]^\beta}{\tilde p_t(c)},

    averaged over both directions and over the batch (the paper's equations 8 to 10). The sum is
    taken in log space, so that no temperature makes it overflow. In a group of more than two
    images every two are a pair: from G forward passes come G (G - 1) terms instead of G.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor [H, G * B, K]
        Rows 0 .. B-1 are the anchors, each further B rows one neighbour of each. No gradient flows
        to the teacher.
    marginal : Tensor [H, K]
        The teacher's marginals before this batch.
    beta : float in (0, 1]
        Exponent of the product; 1 is pointwise mutual information, lower values spread the images
        over more clusters. The paper uses 0.6.
    student_temp, teacher_temp : float > 0
        Softmax temperatures; the paper uses 0.1 for both.
    loss : {"temi", "wmi", "pmi", "scan"}
        ``temi`` weighs each pair by the mean of all heads' pair weights, ``wmi`` by each head's
        own, ``pmi`` by 1 and with beta = 1. ``scan`` is ``scan_loss``, another objective, for
        comparison: of the above it uses the student's logits and temperature alone.
    group_size : int
        G, images in a group; the paper has pairs.

    Returns
    -------
    head_losses : Tensor [H]
        Their mean over heads is what training minimises.
    marginal : Tensor [H, K]
        The marginals after this batch, updated *before* the loss was computed from them.

    Raises
    ------
    ValueError
        If there is no such ``loss``.
    """
    if loss not in ("temi", "wmi", "pmi", "scan"):
        raise ValueError(f"loss={loss!r}: one of 'temi', 'wmi', 'pmi', 'scan' is allowed")
    student_logits = student_logits.to(marginal.dtype)  # products may come in half precision
    teacher_logits = teacher_logits.to(marginal.dtype)
    if loss == "pmi":
        beta = 1.0
    log_student = (student_logits / student_temp).log_softmax(dim=-1)  # (H, G * B, K)
    with torch.no_grad():
        log_teacher = (teacher_logits / teacher_temp).log_softmax(dim=-1)  # (H, G * B, K)
        teacher_probs = log_teacher.exp()
        marginal = update_marginal(marginal, teacher_probs)
        log_teacher = beta * log_teacher - marginal.log().unsqueeze(1)
    if loss == "scan":
        return scan_loss(log_student, group_size), marginal
    log_student = beta * log_student
    batch_size = log_student.shape[1] // group_size
    total = torch.zeros_like(marginal[:, 0])  # (H)
    for shift in range(batch_size, group_size * batch_size, batch_size):  # rolls to each partner
        weights = pair_weights(teacher_probs, teacher_probs.roll(shift, dims=1))  # (H, G * B)
        if loss == "temi":
            weights = weights.mean(dim=0)  # (G * B)
        elif loss == "pmi":
            weights = torch.ones_like(weights[0])
        log_ratio = log_student + log_teacher.roll(shift, dims=1)  # (H, G * B, K)
        total = total - (weights * log_ratio.logsumexp(dim=-1)).mean(dim=-1)
    return total / (group_size - 1), marginal


def scan_loss(log_probs: Tensor, group_size: int = 2) -> Tensor:
    r"""Loss of SCAN: neighbours in the same cluster, images spread over all clusters.

    .. math:: -\log \sum_c p(c \mid x)\, p(c \mid x') - \lambda H(\bar p),

    the first averaged over the pairs, :math:`\bar p` the mean probabilities of the batch and H
    their entropy (Van Gansbeke et al., ECCV 2020, equation 2). The weight :math:`\lambda = 5` is
    that of its authors. There is no teacher in it: the student sees both images of a pair.

    Parameters
    ----------
    log_probs : Tensor [H, G * B, K]
        Logarithms of the student's probabilities, rows as in :func:`temi_loss`.
    group_size : int
        G, images in a group.

    Returns
    -------
    Tensor [H]
    """
    rows = log_probs.shape[1]
    batch_size = rows // group_size
    total = torch.zeros_like(log_probs[:, 0, 0])  # (H)
    for shift in range(batch_size, rows, batch_size):  # rolls to each partner
        together = (log_probs + log_probs.roll(shift, dims=1)).logsumexp(dim=-1)  # (H, G * B)
        total = total - together.mean(dim=-1)
    batch_mean = distributed.mean(log_probs.exp().mean(dim=1))  # (H, K)
    entropy = torch.special.entr(batch_mean).sum(dim=-1)  # (H)
    return total / (group_size - 1) - SCAN_ENTROPY * entropy
