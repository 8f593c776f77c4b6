"""The TEMI objective and the two simpler objectives that it grew from.

Equation numbers are those of the chapter "From mutual information to TEMI", which derives them;
the paper is Adaloglou et al., "Exploring the Limits of Deep Image Clustering using Pretrained
Models", BMVC 2023.
"""

import torch
from torch import Tensor

LOSSES = ("temi", "wmi", "pmi")


def update_marginal(marginal: Tensor, teacher_probs: Tensor, momentum: float = 0.9) -> Tensor:
    """Running estimate of how often the teacher uses each cluster.

    Parameters
    ----------
    marginal : Tensor [H, K]
        Estimate before this batch; it starts uniform, 1 / K.
    teacher_probs : Tensor [H, 2B, K]
        Teacher probabilities of both views.
    momentum : float
        Share of the old estimate that is kept.

    Returns
    -------
    Tensor [H, K]
        New estimate, floored at the smallest normal number of its dtype: a cluster that no image
        uses would otherwise reach zero and make the loss infinite.
    """
    batch_mean = teacher_probs.mean(dim=1).to(marginal.dtype)  # (H, K)
    updated = momentum * marginal + (1 - momentum) * batch_mean
    return updated.clamp_min(torch.finfo(marginal.dtype).tiny)


def pair_weights(teacher_probs: Tensor) -> Tensor:
    """Probability, under each head's teacher, that the two views of a pair share a cluster.

    Parameters
    ----------
    teacher_probs : Tensor [H, 2B, K]
        Rows 0 .. B-1 are the anchors, rows B .. 2B-1 their neighbours.

    Returns
    -------
    Tensor [H, B]
        Values in (0, 1]; their mean over heads is TEMI's w(x, x').
    """
    anchors, neighbors = teacher_probs.chunk(2, dim=1)  # (H, B, K) each
    return (anchors * neighbors).sum(dim=-1)


def temi_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    marginal: Tensor,
    *,
    beta: float = 0.6,
    student_temp: float = 0.1,
    teacher_temp: float = 0.1,
    loss: str = "temi",
) -> tuple[Tensor, Tensor]:
    r"""Loss of each head on a batch of pairs, and the marginals used for it.

    For a pair (x, x') and the direction in which the student sees x and the teacher x',

    .. math:: -w(x, x') \log \sum_c
              \frac{\left[p_s(c \mid x)\, p_t(c \mid x')\right]^\beta}{\tilde p_t(c)},

    averaged over both directions and over the batch (the paper's equations 8 to 10). The sum is
    taken in log space, so that no temperature makes it overflow.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor [H, 2B, K]
        Rows 0 .. B-1 are the anchors, rows B .. 2B-1 their neighbours. No gradient flows to the
        teacher.
    marginal : Tensor [H, K]
        The teacher's marginals before this batch.
    beta : float in (0, 1]
        Exponent of the product; 1 is pointwise mutual information, lower values spread the images
        over more clusters. The paper uses 0.6.
    student_temp, teacher_temp : float > 0
        Softmax temperatures; the paper uses 0.1 for both.
    loss : {"temi", "wmi", "pmi"}
        ``temi`` weighs each pair by the mean of all heads' pair weights, ``wmi`` by each head's
        own, ``pmi`` by 1 and with beta = 1.

    Returns
    -------
    head_losses : Tensor [H]
        Their mean over heads is what training minimises.
    marginal : Tensor [H, K]
        The marginals after this batch, updated *before* the loss was computed from them.
    """
    student_logits = student_logits.to(marginal.dtype)  # products may come in half precision
    teacher_logits = teacher_logits.to(marginal.dtype)
    log_student = (student_logits / student_temp).log_softmax(dim=-1)  # (H, 2B, K)
    with torch.no_grad():
        log_teacher = (teacher_logits / teacher_temp).log_softmax(dim=-1)  # (H, 2B, K)
        teacher_probs = log_teacher.exp()
        marginal = update_marginal(marginal, teacher_probs)
        weights = pair_weights(teacher_probs)  # (H, B)
        if loss == "temi":
            weights = weights.mean(dim=0)  # (B)
        elif loss == "pmi":
            weights, beta = torch.ones_like(weights[0]), 1.0
        swapped = log_teacher.roll(log_teacher.shape[1] // 2, dims=1)  # each row's partner
    log_ratio = beta * (log_student + swapped) - marginal.log().unsqueeze(1)  # (H, 2B, K)
    pair_information = log_ratio.logsumexp(dim=-1)  # (H, 2B)
    both = weights.repeat(*[1] * (weights.dim() - 1), 2)  # the same weight in both directions
    return -(both * pair_information).mean(dim=-1), marginal
