"""Rules of functions with kinks or jumps, linear or constant in between, and of absolute values.

Their secants are exact at every distance; see :mod:`.univariate` for the form of a formula. Of
complex numbers the absolute value and the sign are functions of two variables, with rules of their
own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached_between, multiply_in_place
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.secants import (
    divide_parts,
    linear_with_kink_secant,
    piecewise_secant,
    scale,
    step_secant,
)
from fxshap.rules.elementwise import elementwise

aten = torch.ops.aten


def relu_secant(r: Tensor, x: Tensor) -> Tensor:
    """hi+ / (hi+ + lo-): the positive part of the larger endpoint, the negative one of the smaller.

    It is 1 where both are positive, 0 where neither is, and the secant across the kink.
    """
    positive = torch.maximum(x, r).clamp_(min=0)
    negative = torch.minimum(x, r).clamp_(max=-torch.finfo(r.dtype).tiny)
    return positive.div_(torch.sub(positive, negative, out=negative))


def relu_minus_moment_secant(r: Tensor, x: Tensor, moment_r: Tensor, moment_x: Tensor) -> Tensor:
    """Secant of relu(x) - moment(x), by its quotient.

    The difference of relu is exactly x - r where both are positive.
    """
    change = x.clamp(min=0) - r.clamp(min=0)
    return change.sub_(moment_x - moment_r).div_(x - r)


def abs_secant(r: Tensor, x: Tensor) -> Tensor:
    """(|x| - |r|) / (x - r) = (x + r) / (|x| + |r|); 0 where both are 0."""
    return (x + r) / (x.abs() + r.abs()).clamp_min(torch.finfo(x.dtype).tiny)


# --- the rules --------------------------------------------------------------------------------

elementwise(
    aten.relu6, aten.hardtanh, aten.clamp, aten.clip, aten.clamp_min, aten.clamp_max,
    aten.threshold, aten.hardshrink, aten.softshrink, aten.frac, aten.nan_to_num,
    secant=piecewise_secant,
)  # fmt: skip
elementwise(
    aten.sign, aten.floor, aten.ceil, aten.round, aten.trunc, aten.fix, aten.heaviside,
    secant=step_secant,
)  # fmt: skip
elementwise(
    aten.leaky_relu, aten.prelu, aten._prelu_kernel, aten.rrelu, secant=linear_with_kink_secant
)


@rule(aten.relu, grads_batched=True)
def relu(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """max(0, x)."""
    (r,), (x,) = reference, sample
    return (multiply_in_place(cached_between(operation, r, x, lambda: relu_secant(r, x)), grad),)


@rule(aten.abs)
def absolute(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """|x| - |r| = Re(conj(x + r) (x - r)) / (|x| + |r|), for real and for complex numbers."""
    (r,), (x,) = reference, sample
    return (grad * abs_secant(r, x),)


@rule(aten.sgn)
def sgn(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """y = z / |z|: the midpoint rule for y |z| = z; of a real number a step.

    With a bar for the mean of both endpoints, dy = (dz - y_bar d|z|) / |z|_bar, and d|z| has the
    multiplier of :func:`abs_secant`. All of it is computed for the larger endpoint of length 1.
    """
    (r,), (x,) = reference, sample
    if not r.is_complex():
        return (scale(grad, step_secant(r, x, operation)),)
    unit = torch.maximum(r.abs(), x.abs())
    unit = torch.where(unit == 0, 1.0, unit)
    r, x = divide_parts(r.expand_as(unit), unit), divide_parts(x.expand_as(unit), unit)
    twice_y, twice_length = r.sgn() + x.sgn(), r.abs() + x.abs()
    of_length = (grad.conj() * twice_y).real * abs_secant(r, x) / 2
    slope = torch.where(twice_length == 0, 0.0, 2 * (grad - of_length) / twice_length)
    return (divide_parts(slope, unit),)
