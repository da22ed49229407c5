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

from fxshap.rules.core.caching import cached
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.secants import replace_close
from fxshap.rules.elementwise import elementwise
from fxshap.rules.univariate import relu_slope

aten = torch.ops.aten

#: Beyond it both tails are 0 in float64, and what makes good for rounding would overflow.
NOTHING_LEFT = 64.0


def split_square(z: Tensor) -> tuple[Tensor, Tensor]:
    """z^2 as an exact part and a small rest: exp(-z^2) magnifies the rounding of z^2 by z^2."""
    nearby = (z * 16).round() / 16
    return nearby.square(), (z - nearby) * (z + nearby)


def normal_tail(z: Tensor) -> Tensor:
    """1 - Phi(z) = erfc(a) / 2 for z >= 0 and a = z / sqrt 2, made good for the rounding of a.

    erfc(a) e^(a^2) varies slowly, so the factor e^(a^2 - z^2 / 2) is what the rounding costs.
    """
    z = z.clamp(max=NOTHING_LEFT)
    a = z * math.sqrt(0.5)
    exact_a, rest_a = split_square(a)
    exact_z, rest_z = split_square(z)
    lost = (exact_a - exact_z / 2) + (rest_a - rest_z / 2)
    tail: Tensor = torch.special.erfc(a) / 2 * torch.exp(lost)
    return tail


def root_density(z: Tensor) -> Tensor:
    """e^(-z^2 / 4), the square root of the normal density up to a constant."""
    exact, rest = split_square(z.clamp(-NOTHING_LEFT, NOTHING_LEFT))
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
    """Mean of the normal density between close ends: (Phi(x) - Phi(r)) / (x - r).

    With c the midpoint and h half the difference it is phi(c) sum_k h^2k He_2k(c) / (2k + 1)!, the
    Taylor series by Hermite polynomials, and phi(c) is e^(h^2 / 2) times the geometric mean of phi
    at both ends. Ends are close where h (1 + |c|) < CLOSE / 2, which leaves less than 1e-18 behind
    the sixth power.
    """
    c, h = (x + r) / 2, (x - r) / 2
    u, v = (c * h).square_(), h.square_()
    sixth = u * (u * (u - 15 * v) + 45 * v.square()) - 15 * v.square() * v
    fourth = u * (u - 6 * v) + 3 * v.square()
    total = (1 + (u - v) / 6 + fourth / 120 + sixth / 5040) * torch.exp(v / 2)
    roots = cached(x, "root density", root_density) * cached(r, "root density", root_density)
    return roots * total / math.sqrt(2 * math.pi)


def normal_slope(r: Tensor, x: Tensor) -> Tensor:
    """(Phi(x) - Phi(r)) / (x - r); distant ends use whichever tails are small."""
    above_r, above_x = r > 0, x > 0
    tail_r, tail_x = normal_tail(r.abs()), normal_tail(x.abs())
    steps = above_x.to(x.dtype) - above_r.to(r.dtype)
    tails = torch.where(above_x, -tail_x, tail_x) - torch.where(above_r, -tail_r, tail_r)
    return replace_close((steps + tails) / (x - r), r, x, mean_density)


def gelu_slope(r: Tensor, x: Tensor) -> Tensor:
    """Secant of x Phi(x) = relu(x) - moment(x): by parts from afar, as a product when close.

    What is kept of one end by `close` is kept of the tap itself only where all of it is asked for.
    """

    def close(r: Tensor, x: Tensor) -> Tensor:
        cdf = cached(x, "normal cdf", normal_cdf) + cached(r, "normal cdf", normal_cdf)
        return cdf / 2 + (x + r) / 2 * mean_density(r, x)

    change = cached(x, "normal moment", moment) - cached(r, "normal moment", moment)
    far = relu_slope(r, x).sub_(change.div_(x - r))
    return replace_close(far, r, x, close)


def gelu(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of x * P(x), P = Phi or, for ``approximate="tanh"``, the logistic of a cubic."""
    return gelu_tanh_slope(r, x) if operation["approximate"] == "tanh" else gelu_slope(r, x)


#: u(z) = CUBIC z (z^2 + 1 / 0.044715), each constant as a short or float32 number and a rest.
CUBIC = 2 * math.sqrt(2 / math.pi) * 0.044715
CUBIC_MAIN = torch.tensor(CUBIC, dtype=torch.float32).item()
CUBIC_REST = CUBIC - CUBIC_MAIN
SHIFT_MAIN = round(256 / 0.044715) / 256
SHIFT_REST = 1 / 0.044715 - SHIFT_MAIN


def cubic_tail(z: Tensor) -> Tensor:
    """1 - s(u) = e^-u / (1 + e^-u) for u >= 0, u = 2 sqrt(2/pi) (z + 0.044715 z^3), z >= 0.

    As in :func:`split_square`, u is the sum of a part with one rounding and a small rest.
    """
    z = z.clamp(max=NOTHING_LEFT)
    nearby = (z * 16).round() / 16
    rest = z - nearby
    shifted = nearby.square() + SHIFT_MAIN  # exact, as is its product with nearby
    product = nearby * shifted
    correction = rest * shifted + z * (rest * (z + nearby) + SHIFT_REST)
    small = CUBIC_REST * product + CUBIC * correction
    e = torch.exp(-CUBIC_MAIN * product) * torch.exp(-small)
    return e / (1 + e)


def gelu_tanh_slope(r: Tensor, x: Tensor) -> Tensor:
    """Secant of x s(u), since (1 + tanh z) / 2 = s(2z), in the two forms of :func:`gelu_slope`."""
    near_r, near_x = (end.clamp(-NOTHING_LEFT, NOTHING_LEFT) for end in (r, x))
    d = near_x - near_r
    rate = CUBIC * (near_x.square() + near_x * near_r + near_r.square() + 1 / 0.044715)  # du / d
    gap = (rate * d).abs()
    tail_r, tail_x = cubic_tail(r.abs()), cubic_tail(x.abs())
    s_r, s_x = torch.where(r > 0, 1 - tail_r, tail_r), torch.where(x > 0, 1 - tail_x, tail_x)
    not_r, not_x = torch.where(r > 0, tail_r, 1 - tail_r), torch.where(x > 0, tail_x, 1 - tail_x)
    # s(hi) - s(lo) = s(hi) s(-lo) (1 - e^-|du|), over |du|
    both = torch.where(x > r, s_x * not_r, s_r * not_x)
    slope = both * torch.where(d == 0, 1.0, -torch.expm1(-gap) / gap)
    close = (s_x + s_r) / 2 + (near_x + near_r) / 2 * rate * slope
    d = x - r
    far = (x.relu() - r.relu()) / d - (x.abs() * tail_x - r.abs() * tail_r) / d
    return torch.where(gap < 1, close, far)


def erf(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """erf z = 2 Phi(z sqrt 2) - 1."""
    return 2 * math.sqrt(2) * normal_slope(r * math.sqrt(2), x * math.sqrt(2))


def erfc(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """erfc z = 1 - erf z."""
    return -erf(operation, r, x)


def ndtr(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of Phi itself."""
    return normal_slope(r, x)


elementwise(aten.gelu, slope=gelu, bounded=True)
elementwise(aten.erf, aten.special_erf, slope=erf)
elementwise(aten.erfc, aten.special_erfc, slope=erfc)
elementwise(aten.special_ndtr, slope=ndtr)
