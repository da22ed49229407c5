"""Models that differentiate inside: forces, Hamiltonian networks, residuals of equations."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tests.networks.reports.report import Report

report = partial(Report, family="derivatives", source="models of physics")


class Energy(nn.Module):
    """An energy of ten coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 1))

    def gradient(self, x: Tensor) -> Tensor:
        """Return the derivative of the energy with respect to every coordinate."""
        (gradient,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return gradient


class Forces(Energy):
    """The input itself requires a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.requires_grad_()
            return -self.gradient(x)


class Hamiltonian(Energy):
    """The derivatives of a copy, turned into those of positions and momenta."""

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        with torch.enable_grad():
            gradient = self.gradient(x.clone().requires_grad_())
            return torch.cat([gradient[:, 5:], -gradient[:, :5]], 1)


class Residual(Energy):
    """The value and its derivative by the last input, outside the context."""

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        with torch.enable_grad():
            inside = x.clone().requires_grad_()
            gradient = self.gradient(inside)
        return gradient[:, -1:] + self.net(x) * x[:, :1]


REPORTS = [
    report("forces", architecture=Forces, outputs=10),
    report("hamiltonian", architecture=Hamiltonian, outputs=10),
    report("residual", architecture=Residual, outputs=1),
]
