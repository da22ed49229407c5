"""Comparisons, selections and piecewise functions written by hand."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.mlp import MLP, Between
from tests.networks.network import Network

network = partial(Network, family="logic")


def _leaky_by_where(h: Tensor) -> Tensor:
    return torch.where(h > 0, h, 0.2 * h)


def _cubic_piece(h: Tensor) -> Tensor:
    inner = torch.where(h < -1, -h - 0.5, h**3 / 3)
    return torch.where(h >= 1.5, torch.log(h.clamp(min=1.5)), inner)


def _masked_filled(h: Tensor) -> Tensor:
    return h.masked_fill(h < -0.5, -0.5).masked_fill(h.abs() > 1.5, 2.0)


def _mask_times_value(h: Tensor) -> Tensor:
    return (h > 0).float() * h + (h <= -1).to(h.dtype) * 0.3


def _masked_assignment(h: Tensor) -> Tensor:
    h = h.clone()
    h[h < 0] = 0.0
    return h


def _masked_update(h: Tensor) -> Tensor:
    h = h.clone()
    h[h < 0] *= 0.2
    large = h > 1
    h[large] = h[large].log() + 1
    return h


def _combined_conditions(h: Tensor) -> Tensor:
    first, second = h.chunk(2, dim=1)
    inside = (first > -1) & (first < 1)
    either = inside | ~(second > first)
    return torch.where(either, first * second, first.sin()) + torch.sign(second) * 0.2


class Splines(nn.Module):
    """Piecewise linear splines of each feature from basis functions cut out by comparisons."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(-2.5, 2.5, 6))
        self.coefficients = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate hat functions between the knots and combine them."""
        left, middle, right = self.knots[:-2], self.knots[1:-1], self.knots[2:]
        x = x.unsqueeze(-1)
        rising = (x - left) / (middle - left) * ((x >= left) & (x < middle))
        falling = (right - x) / (right - middle) * ((x >= middle) & (x < right))
        return self.coefficients((rising + falling).flatten(1)).tanh()


NETWORKS = [
    network("piecewise_by_where", architecture=lambda: MLP(_leaky_by_where, _cubic_piece)),
    network("masked_fill", architecture=lambda: MLP(_masked_filled, F.relu)),
    network("mask_times_value", architecture=lambda: MLP(_mask_times_value, _mask_times_value)),
    network("masked_assignment", architecture=lambda: MLP(_masked_assignment)),
    network("masked_update", architecture=lambda: MLP(_masked_update, _masked_update)),
    network("combined_conditions", architecture=lambda: Between(_combined_conditions)),
    network("hat_splines", architecture=Splines),
]
