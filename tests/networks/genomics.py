"""Networks for sequences of DNA, the way their papers describe them.

Real ones read four letters; here there are two, so that ten features are five positions.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.network import Network

network = partial(Network, family="genomics", shapes=((2, 5),))


class BPNet(nn.Module):
    """BPNet (Avsec et al. 2021a, fig. 1): dilated residual convolutions, a profile and counts.

    The profile is a transposed convolution, here as the probabilities' logarithms; the logarithm
    of the total count comes from the mean over positions.
    """

    def __init__(self, width: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, width, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=2**i, dilation=2**i) for i in range(1, layers + 1)
        )
        self.profile = nn.ConvTranspose1d(width, 1, 3, padding=1)
        self.count = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logarithms of the profile of five positions and of the count."""
        x = F.relu(self.first(x))
        for layer in self.layers:
            x = x + F.relu(layer(x))
        profile = F.log_softmax(self.profile(x).flatten(1), dim=1)
        return torch.cat([profile, self.count(x.mean(2))], dim=1)


def quick_gelu(x: Tensor) -> Tensor:
    """GELU as Enformer computes it."""
    return torch.sigmoid(1.702 * x) * x


class ConvolutionBlock(nn.Module):
    """Batch norm, GELU, convolution (Avsec et al. 2021b, extended data fig. 1)."""

    def __init__(self, inside: int, outside: int, size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inside)
        self.convolution = nn.Conv1d(inside, outside, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the activations."""
        return self.convolution(quick_gelu(self.norm(x)))


class AttentionPooling(nn.Module):
    """A mean over two positions whose weights are a softmax of the values (Avsec et al. 2021b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.logits = nn.Conv1d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the length; a position too many has no weight."""
        missing = x.shape[-1] % 2
        logits = F.pad(self.logits(x), (0, missing), value=torch.finfo(x.dtype).min)
        weights = logits.unflatten(-1, (-1, 2)).softmax(-1)
        return (F.pad(x, (0, missing)).unflatten(-1, (-1, 2)) * weights).sum(-1)


class RelativeAttention(nn.Module):
    """Attention with relative positions in basis functions (Avsec et al. 2021b, methods).

    A logit is (q + u) k + (q + v) r, where r is a projection of functions of the distance, even
    ones and the same with its sign (Dai et al. 2019).
    """

    def __init__(self, width: int, heads: int = 2, functions: int = 4) -> None:
        super().__init__()
        self.heads, self.functions = heads, functions
        self.queries, self.keys, self.values = (
            nn.Linear(width, width, bias=False) for _ in range(3)
        )
        self.positions = nn.Linear(2 * functions, width, bias=False)
        self.content_bias, self.position_bias = (
            nn.Parameter(0.3 * torch.randn(heads, 1, width // heads)) for _ in range(2)
        )
        self.output = nn.Linear(width, width)

    def features(self, length: int, like: Tensor) -> Tensor:
        """Exponential decays of the distance, from -length + 1 to length - 1, and with its sign."""
        distance = torch.arange(-length + 1, length, dtype=like.dtype, device=like.device)
        half_life = 2.0 ** torch.arange(self.functions, dtype=like.dtype, device=like.device)
        even = torch.exp2(-distance.abs().unsqueeze(1) / half_life)
        return torch.cat([even, distance.sign().unsqueeze(1) * even], dim=1)

    @staticmethod
    def shift(x: Tensor) -> Tensor:
        """Turn columns of distances into columns of keys, by a pad and two views."""
        batch, heads, length, columns = x.shape
        x = F.pad(x, (1, 0)).reshape(batch, heads, columns + 1, length)[:, :, 1:]
        return x.reshape(batch, heads, length, columns)[..., : (columns + 1) // 2]

    def forward(self, x: Tensor) -> Tensor:
        """Attend over positions; `x` is (batch, length, width)."""

        def split(h: Tensor) -> Tensor:
            return h.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

        q, k, v = (split(layer(x)) for layer in (self.queries, self.keys, self.values))
        q = q * q.shape[-1] ** -0.5
        r = split(self.positions(self.features(x.shape[1], x)))
        content = torch.einsum("bhid,bhjd->bhij", q + self.content_bias, k)
        position = torch.einsum("bhid,hjd->bhij", q + self.position_bias, r)
        weights = (content + self.shift(position)).softmax(dim=-1)
        return self.output((weights @ v).transpose(1, 2).flatten(2))


class Enformer(nn.Module):
    """Enformer (Avsec et al. 2021b, fig. 1): a tower of convolutions, then a transformer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, width, 3, padding=1)
        self.residual = ConvolutionBlock(width, width, 1)
        self.pool = AttentionPooling(width)
        self.tower = ConvolutionBlock(width, width, 3)
        self.tower_residual = ConvolutionBlock(width, width, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = RelativeAttention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.pointwise = nn.Conv1d(width, 2 * width, 1)
        self.head = nn.Conv1d(2 * width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the tracks over the positions."""
        x = self.stem(x)
        x = self.pool(x + self.residual(x))
        x = self.tower(x)
        x = (x + self.tower_residual(x)).transpose(1, 2)
        x = x + self.attention(self.norms[0](x))
        x = x + self.down(F.relu(self.up(self.norms[1](x))))
        x = quick_gelu(self.pointwise(x.transpose(1, 2)))
        return F.softplus(self.head(quick_gelu(x))).mean(2)


NETWORKS = [
    network("bpnet", architecture=BPNet, outputs=6),
    network("enformer", architecture=Enformer),
]
