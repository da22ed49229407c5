"""GELU, x * P(x): the rule that started this library, and the divided difference of erf.

With P the standard normal distribution function the product rule and the chain rule of finite
differences give, for any x and r,

    m = mean(P) + mean(x) * (P(x) - P(r)) / (x - r)

Hendrycks and Gimpel 2016, eq. 1 (GELU) and 2 (its tanh form); Shrikumar et al. 2017, eq. 11.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxshap.rules.elementwise import elementwise, sigmoid_slope
from fxshap.rules.operation import Operation

aten = torch.ops.aten

#: Nodes in (0, 1] and weights of 6-point Gauss-Legendre quadrature on [-1, 1], by symmetry.
SYMMETRIC_NODES = (
    (0.2386191860831969, 0.46791393457269104),
    (0.6612093864662645, 0.3607615730481386),
    (0.9324695142031521, 0.17132449237917036),
)


def normal_slope(r: Tensor, x: Tensor) -> Tensor:
    """(Phi(x) - Phi(r)) / (x - r), to full relative accuracy.

    Close ends average the density over the path, phi(c) * mean(exp(-c h t - (h t)^2 / 2)) with
    c the midpoint, h half the difference and t in [-1, 1]; distant ends take the difference of
    the tails on the side where both are small, so nothing cancels.
    """
    d, c = x - r, (x + r) / 2
    near = normal_density(c) * mean_density(c, d / 2)
    tail_side = torch.where(c > 0, -1.0, 1.0).to(d.dtype)
    far = tail_side * (normal_cdf(tail_side * x) - normal_cdf(tail_side * r)) / d
    return torch.where(d.abs() * (1 + c.abs()) < 1, near, far)


def mean_density(c: Tensor, h: Tensor) -> Tensor:
    """Mean of phi(c + h t) / phi(c) over t in [-1, 1]; exp and cosh keep the pairs together."""
    total = torch.zeros_like(c)
    for node, weight in SYMMETRIC_NODES:
        step = node * h
        total += weight * torch.exp(-step.square() / 2) * torch.cosh(c * step)
    return total


def normal_cdf(z: Tensor) -> Tensor:
    """Phi(z) = erfc(-z / sqrt 2) / 2, accurate in the lower tail."""
    return torch.special.erfc(z * -math.sqrt(0.5)) / 2


def normal_density(z: Tensor) -> Tensor:
    """phi(z) = e^(-z^2 / 2) / sqrt(2 pi)."""
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def gelu(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of x * P(x), P = Phi or, for ``approximate="tanh"``, the logistic of a cubic."""
    if operation["approximate"] == "tanh":
        return gelu_tanh(r, x)
    p = (normal_cdf(x) + normal_cdf(r)) / 2
    return p + (x + r) / 2 * normal_slope(r, x)


CUBIC = 0.044715
RATE = 2 * math.sqrt(2 / math.pi)


def gelu_tanh(r: Tensor, x: Tensor) -> Tensor:
    """x * s(u), u = 2 sqrt(2/pi) (x + 0.044715 x^3), since (1 + tanh z) / 2 = s(2z)."""
    u_r = RATE * (r + CUBIC * r**3)
    u_x = RATE * (x + CUBIC * x**3)
    du = RATE * (1 + CUBIC * (x * x + x * r + r * r))
    p = (torch.sigmoid(u_x) + torch.sigmoid(u_r)) / 2
    return p + (x + r) / 2 * du * sigmoid_slope(u_r, u_x)


def erf(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """erf z = 2 Phi(z sqrt 2) - 1."""
    return 2 * math.sqrt(2) * normal_slope(r * math.sqrt(2), x * math.sqrt(2))


def erfc(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """erfc z = 1 - erf z."""
    return -erf(operation, r, x)


def ndtr(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of Phi itself."""
    return normal_slope(r, x)


elementwise(aten.gelu, slope=gelu)
elementwise(aten.erf, aten.special_erf, slope=erf)
elementwise(aten.erfc, aten.special_erfc, slope=erfc)
elementwise(aten.special_ndtr, slope=ndtr)
