"""Univariate functions: the multiplier is the secant slope, in a form without cancellation.

For one input the only multiplier that adds up is the secant (f(x) - f(r)) / (x - r), the rescale
rule of DeepLIFT (Shrikumar et al. 2017, eq. 11). Taken as a quotient it is noise where x and r are
close, so every function here uses the best form it has: a closed divided difference, the exact
secant of a piecewise-linear function, or the mean of the derivative wherever the quotient's own
rounding noise is larger than the difference between the two.

A slope is a function ``slope(operation, r, x) -> (f(x) - f(r)) / (x - r)`` that returns a new
tensor, which the rule multiplies in place. Most of the time of an explanation goes into these few
lines, so they work in place and avoid selections: ``clamp`` to the smallest number takes the place
of a branch for x = r wherever it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached, cached_between, multiply_in_place
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import SecantFn, Tensors, rule
from fxshap.rules.core.secants import (
    piecewise_linear,
    piecewise_secant,
    replace_close,
    scale,
    smooth_secant,
    step_secant,
)
from fxshap.rules.core.tracing import any_or_tracing
from fxshap.rules.elementwise import elementwise

aten = torch.ops.aten


# --- any function -----------------------------------------------------------------------------


def relu_slope(r: Tensor, x: Tensor) -> Tensor:
    """hi+ / (hi+ + lo-): the positive part of the larger end, the negative one of the smaller.

    It is 1 where both are positive, 0 where neither is, the secant across the kink.
    """
    positive = torch.maximum(x, r).clamp_(min=0)
    negative = torch.minimum(x, r).clamp_(max=-torch.finfo(r.dtype).tiny)
    return positive.div_(torch.sub(positive, negative, out=negative))


# --- exponentials and logarithms --------------------------------------------------------------


def mean_decay(r: Tensor, x: Tensor) -> Tensor:
    """(1 - e^-|d|) / |d|, the mean of e^-t for t from 0 to |d|; 1 at d = 0 and where d is nan."""
    least = torch.finfo(r.dtype).tiny
    decay = (x - r).abs_().neg_().clamp_max_(-least)
    decay.nan_to_num_(nan=-least, neginf=-math.inf)  # the difference of equal infinities
    return torch.expm1(decay).div_(decay)


def exp_slope(r: Tensor, x: Tensor) -> Tensor:
    """(e^x - e^r) / (x - r) = e^max (1 - e^-|d|) / |d|; 0 where both are -inf."""
    return mean_decay(r, x).mul_(torch.maximum(x, r).exp_())


def log_slope(r: Tensor, x: Tensor) -> Tensor:
    """(log x - log r) / (x - r) = log1p((hi - lo) / lo) / (hi - lo)."""
    lo, hi = torch.minimum(x, r), torch.maximum(x, r)
    gap = hi - lo
    ratio = gap / lo
    change = torch.where(ratio.isinf(), hi.log() - lo.log(), torch.log1p(ratio))
    return torch.where(gap == 0, lo.reciprocal(), change / gap)


def sigmoid_slope(r: Tensor, x: Tensor) -> Tensor:
    """(s(x) - s(r)) / (x - r) = s(hi) s(-lo) (1 - e^-(hi - lo)) / (hi - lo)."""
    top = torch.maximum(x, r).sigmoid_()
    return mean_decay(r, x).mul_(top).mul_(torch.minimum(x, r).neg_().sigmoid_())


def tanh_slope(r: Tensor, x: Tensor) -> Tensor:
    """tanh z = 2 s(2z) - 1, so its secant is 4 times that of s at doubled ends."""
    return 4 * sigmoid_slope(2 * r, 2 * x)


def softplus_slope(r: Tensor, x: Tensor) -> Tensor:
    """log((1 + e^hi) / (1 + e^lo)) = log1p(s(lo) (e^(hi - lo) - 1)), over hi - lo."""
    lo, hi = torch.minimum(x, r), torch.maximum(x, r)
    gap = hi - lo
    near = torch.log1p(torch.sigmoid(lo) * torch.expm1(gap.clamp(max=1)))
    far = softplus_value(hi) - softplus_value(lo)
    return torch.where(lo == hi, torch.sigmoid(lo), torch.where(gap < 1, near, far) / gap)


def softplus_value(z: Tensor) -> Tensor:
    """log(1 + e^z), without torch's threshold."""
    return torch.logaddexp(z, z.new_zeros(()))


def logarithm(base: float = math.e, shift: float = 0.0) -> SecantFn:
    """Secant of log_base(x + shift)."""

    def log(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
        return log_slope(r + shift, x + shift) / math.log(base)

    return log


def exponential(base: Callable[[Operation], float]) -> SecantFn:
    """Secant of base^x; a base that is not positive has no logarithm and is left to `smooth`."""

    def exp(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
        if base(operation) <= 0:
            return smooth_secant(operation, r, x)
        log_base = math.log(base(operation))
        return log_base * exp_slope(log_base * r, log_base * x)

    return exp


# --- activations ------------------------------------------------------------------------------


def sigmoid(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of 1 / (1 + e^-x)."""
    return sigmoid_slope(r, x)


def tanh(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of tanh x."""
    return tanh_slope(r, x)


def silu(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """x s(x) = relu(x) - |x| s(-|x|): by these parts from afar, mean(s) + mean(x) ds/dx close by.

    The form for close ends cancels from afar, to rounding errors of the size of x itself.
    """

    def moment(z: Tensor) -> Tensor:
        size = z.abs()
        return torch.sigmoid(-size).mul_(size)

    def close(r: Tensor, x: Tensor) -> Tensor:
        s = (torch.sigmoid(x) + torch.sigmoid(r)) / 2
        return s + (x + r) / 2 * sigmoid_slope(r, x)

    change = cached(x, "logistic moment", moment) - cached(r, "logistic moment", moment)
    far = relu_slope(r, x).sub_(change.div_(x - r))
    return replace_close(far, r, x, close)


def log_sigmoid(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """log s(x) = -softplus(-x)."""
    return softplus_slope(-r, -x)


def softplus(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """log(1 + e^(beta x)) / beta; beyond `threshold` torch returns x itself, which jumps a little.

    An end beyond the threshold therefore takes the quotient of what torch computes.
    """
    beta, threshold = operation["beta"], operation["threshold"]
    straight = torch.maximum(x, r) * beta > threshold
    slope = softplus_slope(beta * r, beta * x)
    return (
        torch.where(straight, piecewise_secant(operation, r, x), slope)
        if any_or_tracing(straight)
        else slope
    )


def exponential_unit(
    parameters: Callable[[Operation], tuple[float, float, float]],
) -> SecantFn:
    """Secant of ELU and its kin: `above` * x for x > 0, else `height` * (e^(rate x) - 1)."""

    def elu(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
        above, height, rate = parameters(operation)
        below = height * rate * exp_slope((rate * r).clamp(max=0), (rate * x).clamp(max=0))
        lo, hi = torch.minimum(x, r), torch.maximum(x, r)
        across = piecewise_secant(operation, r, x)
        return torch.where(lo > 0, above, torch.where(hi <= 0, below, across))

    return elu


SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def elu_parameters(operation: Operation) -> tuple[float, float, float]:
    """(above, height, rate) of ``aten.elu``."""
    above = operation["scale"]
    return above, operation["alpha"] * above, operation["input_scale"]


def mish(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """x tanh(softplus(x)) = relu(x) - moment(x), in the two forms of :func:`silu`."""

    def moment(z: Tensor) -> Tensor:
        """z (1 - tanh(softplus(z))) above 0 and -z tanh(softplus(z)) below, in t = e^z."""
        t = torch.exp(z)
        above = 2 / ((1 + t).square() + 1)
        below = t * (t + 2) / (t * (t + 2) + 2)
        return z.abs() * torch.where(z > 0, above, below)

    def close(r: Tensor, x: Tensor) -> Tensor:
        s_r, s_x = softplus_value(r), softplus_value(x)
        t = (torch.tanh(s_r) + torch.tanh(s_x)) / 2
        return t + (x + r) / 2 * tanh_slope(s_r, s_x) * softplus_slope(r, x)

    change = cached(x, "mish moment", moment) - cached(r, "mish moment", moment)
    far = relu_slope(r, x).sub_(change.div_(x - r))
    return replace_close(far, r, x, close)


# --- powers -----------------------------------------------------------------------------------


def sqrt_slope(r: Tensor, x: Tensor) -> Tensor:
    """1 / (sqrt x + sqrt r); 0 where both are 0, where the derivative is infinite."""
    total = x.sqrt() + r.sqrt()
    return torch.where(total == 0, 0.0, total.reciprocal())


def rsqrt_slope(r: Tensor, x: Tensor) -> Tensor:
    """-v_x^2 v_r^2 / (v_x + v_r) with v = s^(-1/2)."""
    return -(x.rsqrt() * r.rsqrt()) / (x.sqrt() + r.sqrt())


def reciprocal_slope(r: Tensor, x: Tensor) -> Tensor:
    """(1/x - 1/r) / (x - r) = -1 / (x r)."""
    return -(x.reciprocal() * r.reciprocal())


def sqrt(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of the square root."""
    return sqrt_slope(r, x)


def rsqrt(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of x^(-1/2)."""
    return rsqrt_slope(r, x)


def reciprocal(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of 1 / x."""
    return reciprocal_slope(r, x)


def square(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """(x^2 - r^2) / (x - r) = x + r."""
    return x + r


def power(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """x^n: the sum of x^i r^(n-1-i) for a small whole n, closed forms for -2, -1, -1/2 and 1/2."""
    n = operation["exponent"]
    if isinstance(n, Tensor):
        return smooth_secant(operation, r, x)
    if n in POWERS:
        return POWERS[n](r, x)
    if n == int(n) and 0 < n <= 8:
        slope = torch.ones_like(r)
        x_power = torch.ones_like(x)
        for _ in range(int(n) - 1):
            x_power = x_power * x
            slope = slope * r + x_power
        return slope
    return smooth_secant(operation, r, x)


POWERS: dict[float, Callable[[Tensor, Tensor], Tensor]] = {
    2: lambda r, x: x + r,
    0.5: sqrt_slope,
    -0.5: rsqrt_slope,
    -1: reciprocal_slope,
    -2: lambda r, x: (x.reciprocal() + r.reciprocal()) * reciprocal_slope(r, x),
}


def positive_power_slope(r: Tensor, x: Tensor, n: float) -> Tensor:
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


def wave(operation: Operation, r: Tensor, x: Tensor, close: Tensor) -> Tensor:
    """`close` where the ends are close, else the quotient, whose rounding does not grow with x."""
    d = x - r
    f_x, f_r = operation(x), operation(r)
    assert isinstance(f_x, Tensor) and isinstance(f_r, Tensor)
    return torch.where((x.abs() + r.abs()) * d.abs() > 1, (f_x - f_r) / d, close)


def sin(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """sin x - sin r = 2 cos((x + r)/2) sin(d/2)."""
    return wave(operation, r, x, torch.cos((x + r) / 2) * half_sinc(x - r))


def cos(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """cos x - cos r = -2 sin((x + r)/2) sin(d/2)."""
    return wave(operation, r, x, -torch.sin((x + r) / 2) * half_sinc(x - r))


def zero(operation: Operation) -> float:
    """Return the kink of the ReLU family."""
    return 0.0


elementwise(aten.exp, aten.expm1, slope=exponential(lambda op: math.e))
elementwise(aten.exp2, aten.special_exp2, slope=exponential(lambda op: 2.0))
elementwise(aten.log, slope=logarithm())
elementwise(aten.log2, slope=logarithm(base=2.0))
elementwise(aten.log10, slope=logarithm(base=10.0))
elementwise(aten.log1p, slope=logarithm(shift=1.0))
elementwise(aten.sigmoid, aten.special_expit, slope=sigmoid, bounded=True)
elementwise(aten.tanh, slope=tanh, bounded=True)
elementwise(aten.silu, slope=silu, bounded=True)
elementwise(aten.mish, slope=mish, bounded=True)
elementwise(aten.softplus, slope=softplus)
elementwise(aten.log_sigmoid, slope=log_sigmoid, bounded=True)
elementwise(aten.elu, slope=exponential_unit(elu_parameters))
elementwise(
    aten.selu, slope=exponential_unit(lambda op: (SELU_SCALE, SELU_SCALE * SELU_ALPHA, 1.0))
)
elementwise(aten.celu, slope=exponential_unit(lambda op: (1.0, op["alpha"], 1 / op["alpha"])))
elementwise(aten.sqrt, slope=sqrt)
elementwise(aten.rsqrt, slope=rsqrt)
elementwise(aten.reciprocal, slope=reciprocal)
elementwise(aten.square, slope=square)
elementwise(aten.pow.Tensor_Scalar, slope=power)
elementwise(aten.sin, slope=sin, bounded=True)
elementwise(aten.cos, slope=cos, bounded=True)

elementwise(
    aten.relu6, aten.hardtanh, aten.clamp, aten.clip, aten.clamp_min, aten.clamp_max,
    aten.threshold, aten.hardshrink, aten.softshrink, aten.frac, aten.nan_to_num,
    slope=piecewise_secant,
)  # fmt: skip
elementwise(
    aten.sign, aten.sgn, aten.floor, aten.ceil, aten.round, aten.trunc, aten.fix, aten.heaviside,
    slope=step_secant,
)  # fmt: skip
elementwise(aten.leaky_relu, aten.prelu, aten._prelu_kernel, aten.rrelu,
            slope=piecewise_linear(zero))  # fmt: skip

elementwise(
    aten.hardswish, aten.hardsigmoid, aten.tan, aten.asin, aten.acos, aten.atan, aten.sinh,
    aten.cosh, aten.asinh, aten.acosh, aten.atanh, aten.erfinv, aten.lgamma,
    aten.digamma, aten.special_digamma, aten.special_gammaln, aten.logit, aten.special_logit,
    aten.special_log1p, aten.special_expm1, aten.sinc, aten.special_sinc,
    aten.special_entr, aten.special_i0, aten.i0, aten.special_i0e, aten.special_i1,
    aten.special_i1e, aten.special_ndtri, aten.special_log_ndtr, aten.special_erfcx,
    aten.deg2rad, aten.rad2deg,
)  # fmt: skip


@rule(aten.relu, stacked=True)
def relu(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """max(0, x)."""
    (r,), (x,) = reference, sample
    return (multiply_in_place(cached_between(operation, r, x, lambda: relu_slope(r, x)), grad),)


def abs_slope(r: Tensor, x: Tensor) -> Tensor:
    """(|x| - |r|) / (x - r) = (x + r) / (|x| + |r|); 0 where both are 0."""
    return (x + r) / (x.abs() + r.abs()).clamp_min(torch.finfo(x.dtype).tiny)


@rule(aten.abs)
def absolute(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """|x| - |r| = Re(conj(x + r) (x - r)) / (|x| + |r|), for real and for complex numbers."""
    (r,), (x,) = reference, sample
    return (grad * abs_slope(r, x),)


@rule(aten.pow.Scalar)
def power_of_constant(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """c^x for a number c: e^(x log c)."""
    (r,), (x,) = reference, sample
    return (scale(grad, exponential(lambda op: op["self"])(operation, r, x)),)
