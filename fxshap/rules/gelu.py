"""Rules of GELU, x * P(x), and of erf and the normal distribution function.

With P the standard normal distribution function the product rule and the chain rule of finite
differences give, for any x and r,

    m = mean(P) + mean(x) * (P(x) - P(r)) / (x - r)

Hendrycks and Gimpel 2016, eq. 1 (GELU) and 2 (its tanh form); Shrikumar et al. 2017, eq. 11.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxshap.rules.core.blocks import in_blocks
from fxshap.rules.core.caching import cached
from fxshap.rules.core.secants import replace_where_close
from fxshap.rules.elementwise import elementwise
from fxshap.rules.piecewise import relu_minus_moment_secant

aten = torch.ops.aten

#: Both tails are 0 in float64 above it, and the corrections for rounding would overflow.
TAIL_END = 64.0


def split_square(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return z^2 as an exact part and a small rest: exp(-z^2) magnifies its rounding by z^2."""
    nearby = (z * 16).round() / 16
    return nearby.square(), (z - nearby) * (z + nearby)


def normal_tail(z: Tensor) -> Tensor:
    """1 - Phi(z) = erfc(a) / 2 for z >= 0 and a = z / sqrt 2, corrected for the rounding of a.

    erfc(a) e^(a^2) varies slowly, so rounding a changes erfc(a) by the factor e^(z^2 / 2 - a^2).
    """
    z = z.clamp(max=TAIL_END)
    a = z * math.sqrt(0.5)
    exact_a, rest_a = split_square(a)
    exact_z, rest_z = split_square(z)
    log_factor = (exact_a - exact_z / 2) + (rest_a - rest_z / 2)
    tail: Tensor = torch.special.erfc(a) / 2 * torch.exp(log_factor)
    return tail


def root_density(z: Tensor) -> Tensor:
    """e^(-z^2 / 4), the square root of the normal density up to a constant."""
    exact, rest = split_square(z.clamp(-TAIL_END, TAIL_END))
    return torch.exp(-exact / 4) * torch.exp(-rest / 4)


def moment(z: Tensor) -> Tensor:
    """|z| (1 - Phi(|z|))."""
    size = z.abs()
    return normal_tail(size).mul_(size)


def normal_cdf(z: Tensor) -> Tensor:
    """Phi(z), tail(-z) for z <= 0 and 1 - tail(z) above."""
    tail = normal_tail(z.abs())
    return torch.where(z > 0, 1 - tail, tail)


def mean_density(r: Tensor, x: Tensor) -> Tensor:
    """Mean of the normal density between close endpoints: (Phi(x) - Phi(r)) / (x - r).

    With c the midpoint and h half the difference it is phi(c) sum_k h^2k He_2k(c) / (2k + 1)!, the
    Taylor series by Hermite polynomials, and phi(c) is e^(h^2 / 2) times the geometric mean of phi
    at both endpoints. Endpoints are close where h (1 + |c|) < CLOSE / 2, where the terms after the
    sixth power are less than 1e-18.
    """
    c, h = (x + r) / 2, (x - r) / 2
    u, v = (c * h).square_(), h.square_()
    sixth = u * (u * (u - 15 * v) + 45 * v.square()) - 15 * v.square() * v
    fourth = u * (u - 6 * v) + 3 * v.square()
    total = (1 + (u - v) / 6 + fourth / 120 + sixth / 5040) * torch.exp(v / 2)
    roots = cached(x, "root density", root_density) * cached(r, "root density", root_density)
    return roots * total / math.sqrt(2 * math.pi)


def normal_cdf_secant(r: Tensor, x: Tensor) -> Tensor:
    """(Phi(x) - Phi(r)) / (x - r); distant endpoints use whichever tails are small."""
    above_r, above_x = r > 0, x > 0
    tail_r, tail_x = normal_tail(r.abs()), normal_tail(x.abs())
    steps = above_x.to(x.dtype) - above_r.to(r.dtype)
    tails = torch.where(above_x, -tail_x, tail_x) - torch.where(above_r, -tail_r, tail_r)
    return replace_where_close((steps + tails) / (x - r), r, x, mean_density)


def gelu_erf_secant(r: Tensor, x: Tensor) -> Tensor:
    """Secant of x Phi(x) = relu(x) - moment(x): of these parts, or of the product when close.

    `close` usually receives a few elements, new tensors for which nothing is cached. While rules
    are traced it receives the taps themselves.
    """

    def close(r: Tensor, x: Tensor) -> Tensor:
        cdf = cached(x, "normal cdf", normal_cdf) + cached(r, "normal cdf", normal_cdf)
        return cdf / 2 + (x + r) / 2 * mean_density(r, x)

    moments = (cached(value, "normal moment", moment) for value in (r, x))
    far = in_blocks(relu_minus_moment_secant, r, x, *moments)
    return replace_where_close(far, r, x, close)


#: u(z) = CUBIC z (z^2 + 1 / 0.044715), each constant as a number of few digits and a rest.
CUBIC = 2 * math.sqrt(2 / math.pi) * 0.044715
CUBIC_MAIN = torch.tensor(CUBIC, dtype=torch.float32).item()
CUBIC_REST = CUBIC - CUBIC_MAIN
SHIFT_MAIN = round(256 / 0.044715) / 256
SHIFT_REST = 1 / 0.044715 - SHIFT_MAIN


def cubic_tail(z: Tensor) -> Tensor:
    """1 - s(u) = e^-u / (1 + e^-u) for u >= 0, u = 2 sqrt(2/pi) (z + 0.044715 z^3), z >= 0.

    As in :func:`split_square`, u is the sum of a part with one rounding and a small rest.
    """
    z = z.clamp(max=TAIL_END)
    nearby = (z * 16).round() / 16
    rest = z - nearby
    shifted = nearby.square() + SHIFT_MAIN  # exact, as is its product with nearby
    product = nearby * shifted
    correction = rest * shifted + z * (rest * (z + nearby) + SHIFT_REST)
    small = CUBIC_REST * product + CUBIC * correction
    e = torch.exp(-CUBIC_MAIN * product) * torch.exp(-small)
    return e / (1 + e)


def gelu_tanh_secant(r: Tensor, x: Tensor) -> Tensor:
    """Secant of x s(u), since (1 + tanh z) / 2 = s(2z), in the forms of :func:`gelu_erf_secant`."""
    near_r, near_x = (value.clamp(-TAIL_END, TAIL_END) for value in (r, x))
    d = near_x - near_r
    rate = CUBIC * (near_x.square() + near_x * near_r + near_r.square() + 1 / 0.044715)  # du / d
    gap = (rate * d).abs()
    tail_r, tail_x = cubic_tail(r.abs()), cubic_tail(x.abs())
    s_r, s_x = torch.where(r > 0, 1 - tail_r, tail_r), torch.where(x > 0, 1 - tail_x, tail_x)
    not_r, not_x = torch.where(r > 0, tail_r, 1 - tail_r), torch.where(x > 0, tail_x, 1 - tail_x)
    # s(hi) - s(lo) = s(hi) s(-lo) (1 - e^-|du|), over |du|
    product = torch.where(x > r, s_x * not_r, s_r * not_x)
    slope = product * torch.where(d == 0, 1.0, -torch.expm1(-gap) / gap)
    close = (s_x + s_r) / 2 + (near_x + near_r) / 2 * rate * slope
    d = x - r
    far = (x.relu() - r.relu()) / d - (x.abs() * tail_x - r.abs() * tail_r) / d
    return torch.where(gap < 1, close, far)


def gelu_secant(r: Tensor, x: Tensor, approximate: str) -> Tensor:
    """Secant of x * P(x), P = Phi or, for ``approximate="tanh"``, the logistic of a cubic."""
    return gelu_tanh_secant(r, x) if approximate == "tanh" else gelu_erf_secant(r, x)


def erf_secant(r: Tensor, x: Tensor) -> Tensor:
    """erf z = 2 Phi(z sqrt 2) - 1."""
    return 2 * math.sqrt(2) * normal_cdf_secant(r * math.sqrt(2), x * math.sqrt(2))


def erfc_secant(r: Tensor, x: Tensor) -> Tensor:
    """erfc z = 1 - erf z."""
    return -erf_secant(r, x)


elementwise(aten.gelu, secant=gelu_secant, bounded=True)
elementwise(aten.erf, aten.special_erf, secant=erf_secant)
elementwise(aten.erfc, aten.special_erfc, secant=erfc_secant)
elementwise(aten.special_ndtr, secant=normal_cdf_secant)
