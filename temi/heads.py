"""Clustering heads: all of them as one batched module."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiHead(nn.Module):
    """H independent clustering heads on a shared embedding, computed together.

    Each head is ``Linear(D, hidden) -> GELU -> Linear(hidden, bottleneck) -> L2-normalise ->
    weight-normalised Linear(bottleneck, K)`` without a last bias, the projection head of DINO
    (Caron et al., 2021) that TEMI uses (Adaloglou et al., 2023, section 4.1). The first layers of
    all heads are one wide matrix product, the later ones batched products, so that no Python loop
    over heads stands in the training step.

    Parameters
    ----------
    in_dim : int
        D, dimension of the embeddings.
    num_clusters : int
        K, outputs of each head.
    num_heads : int
        H.
    hidden_dim, bottleneck_dim : int
        Widths of the two inner layers; 512 and 256 are the paper authors' published settings.
    generator : torch.Generator, optional
        Source of the initial weights; torch's global one when None.
    """

    def __init__(
        self,
        in_dim: int,
        num_clusters: int,
        num_heads: int = 16,
        hidden_dim: int = 512,
        bottleneck_dim: int = 256,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        shapes = {
            "weight1": (num_heads, hidden_dim, in_dim),
            "weight2": (num_heads, bottleneck_dim, hidden_dim),
            "direction": (num_heads, num_clusters, bottleneck_dim),
        }
        for name, shape in shapes.items():
            weight = torch.empty(shape)
            nn.init.trunc_normal_(weight, std=0.02, generator=generator)
            self.register_parameter(name, nn.Parameter(weight))
        self.bias1 = nn.Parameter(torch.zeros(num_heads, hidden_dim))
        self.bias2 = nn.Parameter(torch.zeros(num_heads, bottleneck_dim))
        self.gain = nn.Parameter(torch.ones(num_heads, num_clusters, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every head.

        Parameters
        ----------
        x : Tensor [B, D]
            Embeddings.

        Returns
        -------
        Tensor [H, B, K]
        """
        heads, hidden_dim, _ = self.weight1.shape
        h = F.linear(x, self.weight1.flatten(0, 1), self.bias1.flatten())  # (B, H * hidden)
        h = F.gelu(h).unflatten(1, (heads, hidden_dim)).transpose(0, 1)  # (H, B, hidden)
        h = torch.baddbmm(self.bias2.unsqueeze(1), h, self.weight2.mT)  # (H, B, bottleneck)
        h = F.normalize(h, dim=-1)
        last = self.gain * F.normalize(self.direction, dim=-1)  # (H, K, bottleneck)
        return h @ last.mT  # (H, B, K)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Optimiser groups: decay on weights and gain, none on biases.

        Decay falls on whatever has two or more dimensions in a single, unbatched head; the gain is
        (K, 1) there and counts.
        """
        biases = [self.bias1, self.bias2]
        weights = [self.weight1, self.weight2, self.gain, self.direction]
        return [
            {"params": weights, "weight_decay": weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ]

    def freeze_last_layer(self, frozen: bool) -> None:
        """Take the last layer (gain and direction) out of training, or put it back.

        A frozen layer has no gradient at all: neither decay nor the optimiser's moments touch it.
        """
        for parameter in (self.gain, self.direction):
            parameter.requires_grad_(not frozen)
            parameter.grad = None
