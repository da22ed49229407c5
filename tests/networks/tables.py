"""Networks for tables, the way their papers describe them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.network import Network

network = partial(Network, family="tables")


def sparsemax(z: Tensor) -> Tensor:
    """Project onto the simplex (Martins and Astudillo 2016, algorithm 1)."""
    ranked = z.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    sums = ranked.cumsum(-1) - 1
    support = (ranks * ranked > sums).sum(-1, keepdim=True)
    threshold = sums.gather(-1, support - 1) / support
    return (z - threshold).clamp(min=0)


class GhostBatchNorm(nn.Module):
    """A batch norm over parts of the batch when training (Hoffer et al. 2017)."""

    def __init__(self, width: int, part: int = 16) -> None:
        super().__init__()
        self.part = part
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every part by itself, or all of it with running statistics."""
        if not self.training:
            return self.norm(x)
        return torch.cat([self.norm(part) for part in x.split(self.part)])


class GatedLayer(nn.Module):
    """A linear layer, a ghost batch norm and a GLU."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.linear = shared
        self.norm = GhostBatchNorm(shared.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Gate one half by the other."""
        return F.glu(self.norm(self.linear(x)), dim=-1)


class FeatureTransformer(nn.Module):
    """Gated layers, the first shared among steps (Arik and Pfister 2021, fig. 4c)."""

    def __init__(self, shared: nn.Linear, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [GatedLayer(shared), *(GatedLayer(nn.Linear(width, 2 * width)) for _ in range(2))]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers; the root of a half keeps the variance."""
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = (x + layer(x)) * 0.5**0.5
        return x


class TabNet(nn.Module):
    """TabNet (Arik and Pfister 2021, fig. 4): steps that choose their features by sparsemax."""

    def __init__(self, features: int = 10, decision: int = 4, steps: int = 3) -> None:
        super().__init__()
        self.decision, self.relaxation = decision, 1.3
        width = 2 * decision  # half for the decision, half for the attention
        shared = nn.Linear(features, 2 * width)
        self.norm = nn.BatchNorm1d(features)
        self.transformers = nn.ModuleList(
            FeatureTransformer(shared, width) for _ in range(steps + 1)
        )
        self.attention = nn.ModuleList(
            nn.Sequential(nn.Linear(decision, features), GhostBatchNorm(features))
            for _ in range(steps)
        )
        self.head = nn.Linear(decision, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Sum the decisions of the steps."""
        x = self.norm(x)
        prior = torch.ones_like(x)
        first, *transformers = self.transformers
        h = first(x)
        total = torch.zeros_like(h[:, : self.decision])
        for attention, transformer in zip(self.attention, transformers, strict=True):
            mask = sparsemax(prior * attention(h[:, self.decision :]))
            prior = prior * (self.relaxation - mask)
            h = transformer(mask * x)
            total = total + F.relu(h[:, : self.decision])
        return self.head(total)


class EncoderLayer(nn.Module):
    """A transformer layer with the norm first and a gated ReLU (Gorishniy et al. 2021, fig. 2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then ReGLU."""
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        value, gate = self.up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(value * F.relu(gate))


class FeatureTokenTransformer(nn.Module):
    """FT-Transformer (Gorishniy et al. 2021, section 3.3): a token for every feature, and [CLS]."""

    def __init__(self, features: int = 10, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, width) / 2)
        self.bias = nn.Parameter(torch.randn(features, width) / 2)
        self.summary = nn.Parameter(torch.randn(1, 1, width) / 2)
        self.layers = nn.Sequential(EncoderLayer(width, 2), EncoderLayer(width, 2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Read out the summary token."""
        tokens = x.unsqueeze(-1) * self.weight + self.bias
        tokens = torch.cat([self.summary.expand(x.shape[0], -1, -1), tokens], dim=1)
        return self.head(self.layers(tokens)[:, 0])


class SplineLayer(nn.Module):
    """A layer of learned functions, silu plus a cubic B-spline (Liu et al. 2024, eq. 2.10).

    The splines of degree 0 are comparisons with the knots, the others follow by the recursion of
    de Boor and Cox.
    """

    def __init__(self, inside: int, outside: int, intervals: int = 5, degree: int = 3) -> None:
        super().__init__()
        self.degree = degree
        step = 4.0 / intervals
        knots = torch.arange(-degree, intervals + degree + 1) * step - 2.0
        self.register_buffer("knots", knots)
        self.base = nn.Linear(inside, outside, bias=False)
        self.spline = nn.Parameter(0.3 * torch.randn(outside, inside, intervals + degree))

    def forward(self, x: Tensor) -> Tensor:
        """Sum the functions over the edges into every unit."""
        return self.base(F.silu(x)) + torch.einsum("bik,oik->bo", self.bases(x), self.spline)

    def bases(self, x: Tensor) -> Tensor:
        """Evaluate every B-spline at every feature, in shape (batch, features, splines)."""
        x, t = x.unsqueeze(-1), self.knots
        bases = ((x >= t[:-1]) & (x < t[1:])).to(x.dtype)
        for k in range(1, self.degree + 1):
            rising = (x - t[: -(k + 1)]) / (t[k:-1] - t[: -(k + 1)])
            falling = (t[k + 1 :] - x) / (t[k + 1 :] - t[1:-k])
            bases = rising * bases[..., :-1] + falling * bases[..., 1:]
        return bases


NETWORKS = [
    network("tabnet", architecture=TabNet),
    network("ft_transformer", architecture=FeatureTokenTransformer),
    network(
        "kolmogorov_arnold",
        architecture=lambda: nn.Sequential(SplineLayer(10, 4), SplineLayer(4, 3)),
    ),
]
