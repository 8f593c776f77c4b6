import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from temi.heads import MultiHead

D, K, H, HIDDEN, BOTTLENECK = 6, 5, 3, 8, 4


class Normalize(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


def single_head(heads: MultiHead, index: int) -> nn.Sequential:
    """One head from torch's own modules."""
    first = nn.Linear(D, HIDDEN, dtype=torch.float64)
    second = nn.Linear(HIDDEN, BOTTLENECK, dtype=torch.float64)
    last = weight_norm(nn.Linear(BOTTLENECK, K, bias=False, dtype=torch.float64))
    with torch.no_grad():
        first.weight.copy_(heads.weight1[index])
        first.bias.copy_(heads.bias1[index])
        second.weight.copy_(heads.weight2[index])
        second.bias.copy_(heads.bias2[index])
        last.parametrizations.weight.original0.copy_(heads.gain[index])
        last.parametrizations.weight.original1.copy_(heads.direction[index])
    return nn.Sequential(first, nn.GELU(), second, Normalize(), last)


@pytest.fixture
def heads() -> MultiHead:
    heads = MultiHead(D, K, H, HIDDEN, BOTTLENECK, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():  # so that biases and gains matter
        for parameter in (heads.bias1, heads.bias2, heads.gain):
            parameter += torch.randn_like(parameter)
    return heads


def test_agrees_with_separate_heads(heads):
    x = torch.randn(7, D, dtype=torch.float64)
    expected = torch.stack([single_head(heads, h)(x) for h in range(H)])
    torch.testing.assert_close(heads(x), expected, atol=1e-12, rtol=0)


def test_initial_weights():
    heads = MultiHead(64, 10, generator=torch.Generator().manual_seed(0))
    for name in ("weight1", "weight2", "direction"):
        assert heads.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.02)
    assert (heads.gain == 1).all()
    assert not heads.bias1.any()
    assert not heads.bias2.any()
    assert heads.weight1.shape == (16, 512, 64)
    assert heads.weight2.shape == (16, 256, 512)


def test_heads_start_different_and_repeat_by_seed():
    first, again = (MultiHead(D, K, H, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    assert not torch.equal(first.weight1[0], first.weight1[1])
    assert torch.equal(first.weight1, again.weight1)


def test_decay_spares_biases_alone(heads):
    with_decay, without = heads.parameter_groups(0.1)
    assert with_decay["weight_decay"] == 0.1
    assert without["weight_decay"] == 0
    assert {id(p) for p in without["params"]} == {id(heads.bias1), id(heads.bias2)}
    both = with_decay["params"] + without["params"]
    assert {id(p) for p in both} == {id(p) for p in heads.parameters()}


def test_frozen_last_layer_gets_no_gradient(heads):
    heads.freeze_last_layer(True)
    heads(torch.randn(2, D, dtype=torch.float64)).sum().backward()
    assert heads.gain.grad is None
    assert heads.direction.grad is None
    assert heads.weight1.grad is not None
    heads.freeze_last_layer(False)
    heads(torch.randn(2, D, dtype=torch.float64)).sum().backward()
    assert heads.gain.grad is not None
