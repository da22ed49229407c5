"""Rules of univariate functions: the multiplier is the secant, in a form without cancellation.

For one input the only multiplier that adds up is the secant (f(x) - f(r)) / (x - r), the rescale
rule of DeepLIFT (Shrikumar et al. 2017, eq. 11). As a quotient it is rounding noise where x and r
are close, so every function here uses the best form it has: a closed divided difference, the exact
secant of a piecewise-linear function, or the mean of the derivative wherever the quotient's own
rounding noise is larger than the difference between the two.

A formula is a function ``secant(r, x) -> (f(x) - f(r)) / (x - r)`` that returns a new tensor, which
the rule multiplies in place; :func:`.elementwise` describes its further parameters. Most of the
time of an explanation goes into these few lines. They therefore work in place and avoid selections:
``clamp`` to the smallest normal number takes the place of a branch for x = r wherever it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxshap.rules.core.blocks import in_blocks
from fxshap.rules.core.caching import cached
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.secants import (
    piecewise_secant,
    quotient,
    replace_where_close,
    scale,
    smooth_secant,
    values_at,
)
from fxshap.rules.core.tracing import any_or_tracing
from fxshap.rules.elementwise import elementwise
from fxshap.rules.piecewise import relu_minus_moment_secant

aten = torch.ops.aten


# --- exponentials and logarithms --------------------------------------------------------------


def mean_decay(r: Tensor, x: Tensor) -> Tensor:
    """(1 - e^-|d|) / |d|, the mean of e^-t for t from 0 to |d|; 1 at d = 0 and where d is nan.

    The difference of equal infinities is nan.
    """
    decay = (x - r).abs_().neg_()
    return torch.expm1(decay).div_(decay).nan_to_num_(1.0)


def exp_secant(r: Tensor, x: Tensor) -> Tensor:
    """(e^x - e^r) / (x - r) = e^max (1 - e^-|d|) / |d|; 0 where both are -inf."""
    return mean_decay(r, x).mul_(torch.maximum(x, r).exp_())


def log_secant(r: Tensor, x: Tensor) -> Tensor:
    """(log x - log r) / (x - r) = log1p((hi - lo) / lo) / (hi - lo)."""
    lo, hi = torch.minimum(x, r), torch.maximum(x, r)
    gap = hi - lo
    ratio = gap / lo
    change = torch.where(ratio.isinf(), hi.log() - lo.log(), torch.log1p(ratio))
    return torch.where(gap == 0, lo.reciprocal(), change / gap)


def sigmoid_secant(r: Tensor, x: Tensor) -> Tensor:
    """(s(x) - s(r)) / (x - r) = s(hi) s(-lo) (1 - e^-(hi - lo)) / (hi - lo)."""
    top = torch.maximum(x, r).sigmoid_()
    return mean_decay(r, x).mul_(top).mul_(torch.minimum(x, r).neg_().sigmoid_())


def tanh_secant(r: Tensor, x: Tensor) -> Tensor:
    """tanh z = 2 s(2z) - 1, so its secant is 4 times that of s at doubled endpoints."""
    return 4 * sigmoid_secant(2 * r, 2 * x)


def softplus_secant(r: Tensor, x: Tensor) -> Tensor:
    """log((1 + e^hi) / (1 + e^lo)) = log1p(s(lo) (e^(hi - lo) - 1)), over hi - lo."""
    lo, hi = torch.minimum(x, r), torch.maximum(x, r)
    gap = hi - lo
    near = torch.log1p(torch.sigmoid(lo) * torch.expm1(gap.clamp(max=1)))
    far = softplus_value(hi) - softplus_value(lo)
    return torch.where(lo == hi, torch.sigmoid(lo), torch.where(gap < 1, near, far) / gap)


def softplus_value(z: Tensor) -> Tensor:
    """log(1 + e^z), without torch's threshold."""
    return torch.logaddexp(z, z.new_zeros(()))


def log1p_secant(r: Tensor, x: Tensor) -> Tensor:
    """log1p x = log(x + 1)."""
    return log_secant(r + 1.0, x + 1.0)


def log2_secant(r: Tensor, x: Tensor) -> Tensor:
    """log2 x = log x / log 2."""
    return log_secant(r, x) / math.log(2.0)


def log10_secant(r: Tensor, x: Tensor) -> Tensor:
    """log10 x = log x / log 10."""
    return log_secant(r, x) / math.log(10.0)


def exponential_secant(r: Tensor, x: Tensor, base: float) -> Tensor:
    """base^x = e^(x log base), for a positive base."""
    log_base = math.log(base)
    return log_base * exp_secant(log_base * r, log_base * x)


def exp2_secant(r: Tensor, x: Tensor) -> Tensor:
    """Secant of 2^x."""
    return exponential_secant(r, x, 2.0)


# --- activations ------------------------------------------------------------------------------


def silu_secant(r: Tensor, x: Tensor) -> Tensor:
    """x s(x) = relu(x) - |x| s(-|x|): the secants of these parts, or mean(s) + mean(x) ds/dx.

    The second form is for close endpoints. Between distant ones it cancels, to rounding errors of
    the size of x itself.
    """

    def moment(z: Tensor) -> Tensor:
        size = z.abs()
        return torch.sigmoid(-size).mul_(size)

    def close(r: Tensor, x: Tensor) -> Tensor:
        s = (torch.sigmoid(x) + torch.sigmoid(r)) / 2
        return s + (x + r) / 2 * sigmoid_secant(r, x)

    moments = (cached(value, "logistic moment", moment) for value in (r, x))
    far = in_blocks(relu_minus_moment_secant, r, x, *moments)
    return replace_where_close(far, r, x, close)


def log_sigmoid_secant(r: Tensor, x: Tensor) -> Tensor:
    """log s(x) = -softplus(-x)."""
    return softplus_secant(-r, -x)


def softplus_with_threshold_secant(
    r: Tensor, x: Tensor, operation: Operation, beta: float, threshold: float
) -> Tensor:
    """log(1 + e^(beta x)) / beta, and x itself above `threshold`, where torch jumps a little.

    An endpoint above the threshold therefore takes the quotient of what torch computes.
    """
    above = torch.maximum(x, r) * beta > threshold
    slope = softplus_secant(beta * r, beta * x)
    if any_or_tracing(above):
        slope = torch.where(above, piecewise_secant(r, x, operation), slope)
    return slope


def exponential_unit_secant(
    r: Tensor, x: Tensor, operation: Operation, above: float, height: float, rate: float
) -> Tensor:
    """Secant of `above` * x for x > 0, else `height` * (e^(rate x) - 1): ELU and its variants."""
    below = height * rate * exp_secant((rate * r).clamp(max=0), (rate * x).clamp(max=0))
    lo, hi = torch.minimum(x, r), torch.maximum(x, r)
    across = piecewise_secant(r, x, operation)
    return torch.where(lo > 0, above, torch.where(hi <= 0, below, across))


def elu_secant(
    r: Tensor, x: Tensor, operation: Operation, alpha: float, scale: float, input_scale: float
) -> Tensor:
    """Secant of ``aten.elu``, whose two scales make it SELU or CELU."""
    return exponential_unit_secant(r, x, operation, scale, alpha * scale, input_scale)


#: Klambauer et al. 2017, eq. 14.
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def selu_secant(r: Tensor, x: Tensor, operation: Operation) -> Tensor:
    """Secant of SELU."""
    return exponential_unit_secant(r, x, operation, SELU_SCALE, SELU_SCALE * SELU_ALPHA, 1.0)


def celu_secant(r: Tensor, x: Tensor, operation: Operation, alpha: float) -> Tensor:
    """Secant of CELU."""
    return exponential_unit_secant(r, x, operation, 1.0, alpha, 1 / alpha)


def mish_secant(r: Tensor, x: Tensor) -> Tensor:
    """x tanh(softplus(x)) = relu(x) - moment(x), in the two forms of :func:`silu_secant`."""

    def moment(z: Tensor) -> Tensor:
        """z (1 - tanh(softplus(z))) above 0 and -z tanh(softplus(z)) below, in t = e^z."""
        t = torch.exp(z)
        above = 2 / ((1 + t).square() + 1)
        below = t * (t + 2) / (t * (t + 2) + 2)
        return z.abs() * torch.where(z > 0, above, below)

    def close(r: Tensor, x: Tensor) -> Tensor:
        s_r, s_x = softplus_value(r), softplus_value(x)
        t = (torch.tanh(s_r) + torch.tanh(s_x)) / 2
        return t + (x + r) / 2 * tanh_secant(s_r, s_x) * softplus_secant(r, x)

    moments = (cached(value, "mish moment", moment) for value in (r, x))
    far = in_blocks(relu_minus_moment_secant, r, x, *moments)
    return replace_where_close(far, r, x, close)


# --- powers -----------------------------------------------------------------------------------


def sqrt_secant(r: Tensor, x: Tensor) -> Tensor:
    """1 / (sqrt x + sqrt r); 0 where both are 0, where the derivative is infinite.

    On both sides of the branch cut of complex numbers the sum cancels, and the quotient does not.
    """
    root_r, root_x = r.sqrt(), x.sqrt()
    total = root_x + root_r
    slope = torch.where(total == 0, 0.0, total.reciprocal())
    if not total.is_complex():
        return slope
    change, step = root_x - root_r, x - r
    return torch.where((change.abs() > total.abs()) & (step != 0), quotient(change, step), slope)


def rsqrt_secant(r: Tensor, x: Tensor) -> Tensor:
    """-v_x^2 v_r^2 / (v_x + v_r) with v = s^(-1/2)."""
    if x.is_complex():
        return -(x.rsqrt() * r.rsqrt()) * sqrt_secant(r, x)
    return -(x.rsqrt() * r.rsqrt()) / (x.sqrt() + r.sqrt())


def reciprocal_secant(r: Tensor, x: Tensor) -> Tensor:
    """(1/x - 1/r) / (x - r) = -1 / (x r)."""
    return -(x.reciprocal() * r.reciprocal())


def square_secant(r: Tensor, x: Tensor) -> Tensor:
    """(x^2 - r^2) / (x - r) = x + r."""
    return x + r


def power_secant(r: Tensor, x: Tensor, operation: Operation, exponent: float | Tensor) -> Tensor:
    """x^n: a closed form of `POWERS`, or the sum of x^i r^(n-1-i) for a small integer n > 0."""
    n = exponent
    if isinstance(n, Tensor):
        return smooth_secant(r, x, operation)
    if n in POWERS:
        return POWERS[n](r, x)
    if n == int(n) and 0 < n <= 8:
        slope = torch.ones_like(r)
        x_power = torch.ones_like(x)
        for _ in range(int(n) - 1):
            x_power = x_power * x
            slope = slope * r + x_power
        return slope
    return smooth_secant(r, x, operation)


POWERS: dict[float, Callable[[Tensor, Tensor], Tensor]] = {
    2: square_secant,
    0.5: sqrt_secant,
    -0.5: rsqrt_secant,
    -1: reciprocal_secant,
    -2: lambda r, x: (x.reciprocal() + r.reciprocal()) * reciprocal_secant(r, x),
}


def positive_power_secant(r: Tensor, x: Tensor, n: float) -> Tensor:
    """(x^n - r^n) / (x - r) for x, r >= 0: hi^n (1 - (lo/hi)^n) / (hi - lo); 0 where both are 0."""
    lo, hi = torch.minimum(x, r), torch.maximum(x, r)
    gap = hi - lo
    close = -(hi**n) * torch.expm1(n * torch.log1p(-gap / hi)) / gap
    slope = torch.where(lo > hi / 2, close, (hi**n - lo**n) / gap)
    return torch.where(hi == 0, 0.0, torch.where(gap == 0, n * hi ** (n - 1), slope))


# --- trigonometry -----------------------------------------------------------------------------


def half_sinc(d: Tensor) -> Tensor:
    """sin(d/2) / (d/2)."""
    return torch.sinc(d / (2 * math.pi))


def quotient_if_far(r: Tensor, x: Tensor, operation: Operation, close: Tensor) -> Tensor:
    """`close` for close endpoints, else the quotient, whose rounding does not grow with x."""
    d = x - r
    f_r, f_x = values_at(operation, r, x)
    return torch.where((x.abs() + r.abs()) * d.abs() > 1, (f_x - f_r) / d, close)


def sin_secant(r: Tensor, x: Tensor, operation: Operation) -> Tensor:
    """sin x - sin r = 2 cos((x + r)/2) sin(d/2)."""
    return quotient_if_far(r, x, operation, torch.cos((x + r) / 2) * half_sinc(x - r))


def cos_secant(r: Tensor, x: Tensor, operation: Operation) -> Tensor:
    """cos x - cos r = -2 sin((x + r)/2) sin(d/2)."""
    return quotient_if_far(r, x, operation, -torch.sin((x + r) / 2) * half_sinc(x - r))


# --- the rules --------------------------------------------------------------------------------

elementwise(aten.exp, aten.expm1, secant=exp_secant, holomorphic=smooth_secant)
elementwise(aten.exp2, aten.special_exp2, secant=exp2_secant, holomorphic=smooth_secant)
elementwise(aten.log, secant=log_secant, holomorphic=smooth_secant)
elementwise(aten.log2, secant=log2_secant, holomorphic=smooth_secant)
elementwise(aten.log10, secant=log10_secant, holomorphic=smooth_secant)
elementwise(aten.log1p, secant=log1p_secant, holomorphic=smooth_secant)
elementwise(
    aten.sigmoid, aten.special_expit, secant=sigmoid_secant, bounded=True, holomorphic=smooth_secant
)
elementwise(aten.tanh, secant=tanh_secant, bounded=True, holomorphic=smooth_secant)
elementwise(aten.silu, secant=silu_secant, bounded=True)
elementwise(aten.mish, secant=mish_secant, bounded=True)
elementwise(aten.softplus, secant=softplus_with_threshold_secant)
elementwise(aten.log_sigmoid, secant=log_sigmoid_secant, bounded=True)
elementwise(aten.elu, secant=elu_secant)
elementwise(aten.selu, secant=selu_secant)
elementwise(aten.celu, secant=celu_secant)
elementwise(aten.sqrt, secant=sqrt_secant, holomorphic=sqrt_secant)
elementwise(aten.rsqrt, secant=rsqrt_secant, holomorphic=rsqrt_secant)
elementwise(aten.reciprocal, secant=reciprocal_secant, holomorphic=reciprocal_secant)
elementwise(aten.square, secant=square_secant, holomorphic=square_secant)
elementwise(aten.pow.Tensor_Scalar, secant=power_secant, holomorphic=power_secant)
elementwise(aten.sin, secant=sin_secant, bounded=True, holomorphic=smooth_secant)
elementwise(aten.cos, secant=cos_secant, bounded=True, holomorphic=smooth_secant)


elementwise(
    aten.tan, aten.asin, aten.acos, aten.atan, aten.sinh, aten.cosh, aten.asinh, aten.acosh,
    aten.atanh, aten.sinc, aten.special_sinc, aten.special_log1p, aten.special_expm1,
    holomorphic=smooth_secant,
)  # fmt: skip

elementwise(
    aten.hardswish, aten.hardsigmoid, aten.erfinv, aten.lgamma, aten.digamma,
    aten.special_digamma, aten.special_gammaln, aten.logit, aten.special_logit, aten.special_entr,
    aten.special_i0, aten.i0, aten.special_i0e, aten.special_i1, aten.special_i1e,
    aten.special_ndtri, aten.special_log_ndtr, aten.special_erfcx, aten.deg2rad, aten.rad2deg,
)  # fmt: skip


@rule(aten.pow.Scalar)
def power_of_constant(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """c^x for a number c; a c that is not positive has no logarithm and takes the smooth secant."""
    (r,), (x,) = reference, sample
    base = operation["self"]
    if r.is_complex():
        return (scale(grad, smooth_secant(r, x, operation).conj()),)
    if grad.is_complex():
        return generic(operation, reference, sample, grad)
    if base <= 0:
        return (scale(grad, smooth_secant(r, x, operation)),)
    return (scale(grad, exponential_secant(r, x, base)),)
