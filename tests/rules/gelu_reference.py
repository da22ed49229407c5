"""GELU's multiplier at 60 digits, to compare the library's with."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor

from fxshap.rules.gelu import gelu_erf_secant, gelu_tanh_secant

DIGITS = 60
FORMS = ("erf", "tanh")


def exact_phi(form: str, z: mpmath.mpf) -> mpmath.mpf:
    """Return P(z) of GELU(z) = z P(z)."""
    if form == "erf":
        return mpmath.erfc(-z / mpmath.sqrt(2)) / 2
    u = 2 * mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3)
    return 1 / (1 + mpmath.exp(-u))


def exact_phi_derivative(form: str, z: mpmath.mpf) -> mpmath.mpf:
    """Return P'(z)."""
    if form == "erf":
        return mpmath.npdf(z)
    p = exact_phi(form, z)
    du = 2 * mpmath.sqrt(2 / mpmath.pi) * (1 + 3 * mpmath.mpf("0.044715") * z**2)
    return p * exact_phi(form, -z) * du


def reference(form: str, r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the multiplier at 60 digits, and the magnitude of its two terms.

    The multiplier is m = mean(P) + mean(x) dP/d; the magnitude is |mean(P)| + |mean(x) dP/d|.
    """
    true, magnitude = [], []
    values: dict[float, mpmath.mpf] = {}

    def phi(z: float) -> mpmath.mpf:
        if z not in values:
            values[z] = exact_phi(form, mpmath.mpf(z))
        return values[z]

    with mpmath.workdps(DIGITS):
        for a, b in zip(r.flatten().tolist(), x.flatten().tolist(), strict=True):
            p_a, p_b = phi(a), phi(b)
            d = mpmath.mpf(b) - mpmath.mpf(a)
            slope = (p_b - p_a) / d if d else exact_phi_derivative(form, mpmath.mpf(a))
            first, second = (p_a + p_b) / 2, (mpmath.mpf(a) + b) / 2 * slope
            true.append(float(first + second))
            magnitude.append(float(first + abs(second)))
    return tuple(torch.tensor(v, dtype=torch.float64).reshape(r.shape) for v in (true, magnitude))


def slopes(form: str, r: Tensor, x: Tensor) -> Tensor:
    """Return the library's multiplier."""
    return gelu_erf_secant(r, x) if form == "erf" else gelu_tanh_secant(r, x)


def grid(dtype: torch.dtype, points: int, low: float = -40, high: float = 40) -> tuple[Tensor, ...]:
    """Return endpoints (points, differences): d = 0, and |d| from 1e-12 to 1e2 with both signs."""
    sizes = torch.logspace(-12, 2, 29, dtype=torch.float64)
    d = torch.cat([torch.zeros(1), sizes, -sizes])
    wide = torch.linspace(low, high, points, dtype=torch.float64)
    r = torch.cat([wide, torch.linspace(-3, 3, points // 2)])[:, None].to(dtype)
    x = (r.double() + d).to(dtype)
    return r.expand_as(x), x
