"""Networks whose features interact so much that one pass adds up, but is far from exact values."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.network import Network

network = partial(Network, family="interacting")


class RelativeBandPower(nn.Module):
    """The log of the share of each frequency band, as in models of EEG."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv1d(1, 4, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Take series of shape (batch, steps)."""
        spectrum = torch.fft.rfft(self.filter(x.unsqueeze(1)), dim=-1)
        power = spectrum.real.square() + spectrum.imag.square()
        bands = torch.stack([part.mean(-1) for part in power.split(2, dim=-1)], -1)
        relative = bands / bands.sum(-1, keepdim=True)
        return self.head(torch.log(relative + 1e-6).flatten(1))


class Siren(nn.Module):
    """Sines as activations, with the initialisation of Sitzmann et al. 2020."""

    def __init__(self, width: int = 24, frequency: float = 10.0) -> None:
        super().__init__()
        self.frequency = frequency
        self.first, self.second = nn.Linear(10, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)
        nn.init.uniform_(self.first.weight, -1 / 10, 1 / 10)
        limit = math.sqrt(6 / width) / frequency
        nn.init.uniform_(self.second.weight, -limit, limit)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows of numbers."""
        h = torch.sin(self.frequency * self.first(x))
        return self.head(torch.sin(self.frequency * self.second(h)))


class Spiking(nn.Module):
    """Leaky integrate-and-fire neurons that reset when they fire, counted over time."""

    def __init__(self, width: int = 12, leak: float = 0.8) -> None:
        super().__init__()
        self.leak, self.width = leak, width
        self.input, self.head = nn.Linear(2, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take series of shape (batch, steps, 2)."""
        potential = count = x.new_zeros(x.shape[0], self.width)
        for step in range(x.shape[1]):
            potential = self.leak * potential + self.input(x[:, step])
            spikes = (potential > 0.5).to(x.dtype)
            potential, count = potential * (1 - spikes), count + spikes
        return self.head(count / x.shape[1])


def rotate(x: Tensor) -> Tensor:
    """Rotate pairs of channels by angles that grow with the position (Su et al. 2021)."""
    half = x.shape[-1] // 2
    position = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device).unsqueeze(1)
    angle = position * 10.0 ** -(torch.arange(half, dtype=x.dtype, device=x.device) / half)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class RotaryAttention(nn.Module):
    """Two attention layers with rotary positions and a gated layer, as in Llama."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.projections = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(4))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take tokens of shape (batch, 5, 2)."""
        h = self.embed(x)
        for k, (projection, gate, down) in enumerate(
            zip(self.projections, self.gates, self.downs, strict=True)
        ):
            q, key, v = projection(self.norms[2 * k](h)).chunk(3, dim=-1)
            h = h + F.scaled_dot_product_attention(rotate(q), rotate(key), v, is_causal=True)
            a, b = gate(self.norms[2 * k + 1](h)).chunk(2, dim=-1)
            h = h + down(F.silu(a) * b)
        return self.head(h[:, -1])


class MaxGraph(nn.Module):
    """Two layers that take the largest message of the neighbours (Hamilton et al. 2017)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        edges = [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2), (3, 4), (4, 3), (4, 0), (0, 4)]
        self.register_buffer("source", torch.tensor([a for a, _ in edges]))
        self.register_buffer("target", torch.tensor([b for _, b in edges]))
        self.message = nn.ModuleList([nn.Linear(4, width), nn.Linear(2 * width, width)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take the nodes of one graph, of shape (batch, 5, 2)."""
        for layer in self.message:
            pairs = torch.cat([x[:, self.source], x[:, self.target] - x[:, self.source]], -1)
            messages = F.relu(layer(pairs))
            index = self.target.view(1, -1, 1).expand_as(messages)
            x = messages.new_zeros(x.shape[0], x.shape[1], messages.shape[2]).scatter_reduce(
                1, index, messages, "amax", include_self=False
            )
        return self.head(x.amax(1))


class Orthogonal(nn.Module):
    """The factors of a QR decomposition of computed matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(10, 12)
        self.head = nn.Linear(21, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows of numbers."""
        q, r = torch.linalg.qr(torch.tanh(self.matrix(x)).reshape(-1, 4, 3))
        return self.head(torch.cat([q.flatten(1), r.flatten(1)], 1))


NETWORKS = [
    network("relative_band_power", architecture=RelativeBandPower),
    network("siren", architecture=Siren),
    network("spiking", architecture=Spiking, shapes=((5, 2),)),
    network("rotary_attention", architecture=RotaryAttention, shapes=((5, 2),)),
    network("max_graph", architecture=MaxGraph, shapes=((5, 2),)),
    network("orthogonal_factors", architecture=Orthogonal),
]
