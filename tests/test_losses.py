import numpy as np
import pytest
import torch

from temi.losses import SCAN_ENTROPY, pair_weights, temi_loss, update_marginal

HEADS, PAIRS, CLUSTERS = 3, 5, 4


def logits(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, 2 * PAIRS, CLUSTERS, generator=generator, dtype=torch.float64) / 5


def uniform(dtype=torch.float64) -> torch.Tensor:
    return torch.full((HEADS, CLUSTERS), 1 / CLUSTERS, dtype=dtype)


def softmax(z: np.ndarray) -> np.ndarray:
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


@pytest.mark.parametrize("loss", ["temi", "wmi", "pmi"])
def test_agrees_with_a_plain_loop(loss):
    student, teacher, beta, tau_s, tau_t = logits(0), logits(1), 0.7, 0.15, 0.08
    losses, after = temi_loss(
        student, teacher, uniform(), beta=beta, student_temp=tau_s, teacher_temp=tau_t, loss=loss
    )
    p_s, p_t = softmax(student.numpy() / tau_s), softmax(teacher.numpy() / tau_t)
    marginal = 0.9 / CLUSTERS + 0.1 * p_t.mean(axis=1)
    own = np.einsum("hbk,hbk->hb", p_t[:, :PAIRS], p_t[:, PAIRS:])
    weight = {"temi": np.tile(own.mean(0), (HEADS, 1)), "wmi": own, "pmi": np.ones_like(own)}[loss]
    exponent = 1.0 if loss == "pmi" else beta
    for h in range(HEADS):
        terms = []
        for b in range(PAIRS):
            for x, y in ((b, b + PAIRS), (b + PAIRS, b)):
                ratio = ((p_s[h, x] * p_t[h, y]) ** exponent / marginal[h]).sum()
                terms.append(-weight[h, b] * np.log(ratio))
        assert losses[h].item() == pytest.approx(np.mean(terms), abs=1e-12)
    np.testing.assert_allclose(after.numpy(), marginal, atol=1e-12)


def test_perfect_balanced_clusters_reach_log_k():
    """Confident, agreeing, equally full clusters: information log K, for pmi its maximum."""
    eye = torch.eye(CLUSTERS, dtype=torch.float64).repeat(HEADS, 2, 1) * 100
    losses, _ = temi_loss(eye, eye, uniform(), loss="pmi", student_temp=1, teacher_temp=1)
    np.testing.assert_allclose(losses.numpy(), -np.log(CLUSTERS), atol=1e-12)


def test_uninformative_student_has_zero_information():
    zero = torch.zeros(HEADS, 2 * PAIRS, CLUSTERS, dtype=torch.float64)
    losses, _ = temi_loss(zero, zero, uniform(), loss="pmi")
    np.testing.assert_allclose(losses.numpy(), 0, atol=1e-12)


@pytest.mark.parametrize("group_size", [2, 5])
def test_scan_agrees_with_a_plain_loop(group_size):
    student, tau = logits(0), 0.15
    losses, _ = temi_loss(
        student, logits(1), uniform(), loss="scan", student_temp=tau, group_size=group_size
    )
    rows = 2 * PAIRS
    anchors, p = rows // group_size, softmax(student.numpy() / tau)
    for h in range(HEADS):
        pairs = [(x, y) for x in range(rows) for y in range(rows) if x % anchors == y % anchors]
        together = [np.log(p[h, x] @ p[h, y]) for x, y in pairs if x != y]
        mean = p[h].mean(axis=0)
        expected = -np.mean(together) + SCAN_ENTROPY * (mean * np.log(mean)).sum()
        assert losses[h].item() == pytest.approx(expected, abs=1e-12)


def test_scan_is_least_for_perfect_balanced_clusters():
    eye = torch.eye(CLUSTERS, dtype=torch.float64).repeat(HEADS, 2, 1) * 100
    losses, _ = temi_loss(eye, eye, uniform(), loss="scan", student_temp=1)
    np.testing.assert_allclose(losses.numpy(), -SCAN_ENTROPY * np.log(CLUSTERS), atol=1e-12)


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    temi_loss(student, teacher, uniform())[0].mean().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_pair_weights_are_agreement_probabilities():
    probs = torch.eye(CLUSTERS)[None, [0, 1, 2, 0, 3, 2]]  # pairs (0, 0), (1, 3), (2, 2)
    assert pair_weights(*probs.chunk(2, dim=1)).tolist() == [[1, 0, 1]]


def test_cold_softmax_stays_finite():
    marginal = uniform(torch.float32)
    for seed in range(2000):
        student, teacher = logits(seed).float().requires_grad_(), logits(seed + 1).float()
        teacher[..., 0] -= 100  # a cluster that nothing uses
        losses, marginal = temi_loss(
            student, teacher, marginal, beta=1.0, student_temp=1e-3, teacher_temp=1e-3
        )
        losses.mean().backward()
        assert torch.isfinite(losses).all()
        assert torch.isfinite(student.grad).all()


def test_no_such_loss():
    with pytest.raises(ValueError, match="loss='teme': one of 'temi', 'wmi', 'pmi', 'scan'"):
        temi_loss(logits(0), logits(1), uniform(), loss="teme")


def test_marginals_stay_normal_numbers():
    marginal = torch.full((1, 2), 0.5)
    for _ in range(3000):
        marginal = update_marginal(marginal, torch.tensor([[[1.0, 0.0]]]))
    assert marginal[0, 1] >= torch.finfo(torch.float32).tiny


def test_half_precision_ends_with_the_logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 10, 4, generator=generator).bfloat16() for _ in range(2))
    marginal = torch.full((3, 4), 0.25)
    expected = temi_loss(student.float(), teacher.float(), marginal)[0]
    assert torch.equal(temi_loss(student, teacher, marginal)[0], expected)


def test_entropy_weight_is_that_of_scans_authors():
    assert SCAN_ENTROPY == 5
