"""Rules of activations that use the moments of the sum before them: `rule="variance"`.

A secant gives all inputs of a unit z = sum_j w_j x_j the same slope. The Shapley value of an input
averages over what the other inputs have already added. Let u_j = w_j (x_j - r_j), and let every
input be present with probability t. The sum of those present has the mean z_r + t (z_x - z_r) and
the variance t (1 - t) v, with v = sum_j u_j^2, which is v / 6 on average over t. (Ancona et al.
2019 propagate such variances through whole networks.) The slope is therefore that of the activation
f smoothed by this variance. What the change of the smoothed function lacks of the change of f is
distributed to the inputs by their u_j:

    m_j = w_j (S + T u_j),    S = secant of z -> E f(z + sqrt(v / 6) xi),
    T = (f(z_x) - f(z_r) - S (z_x - z_r)) / v

This adds up: sum_j m_j (x_j - r_j) = S (z_x - z_r) + T v. The mean over a standard normal xi is
taken at -sqrt 2, 0 and sqrt 2 with the weights 1/4, 1/2 and 1/4, which have its first three
moments.

If the terms are activations themselves, their means over the coalitions are not on the straight
line: ReLU of a sum that scatters has a mean above that of its endpoints. Let c be the shift of the
mean of z from the middle of z_r and z_x at t = 1/2. Then S is the mean of the secants from z_r to
(z_r + z_x) / 2 + 4 c / 3 and from there to z_x; with 4/3 both lines are on average over t as far
from the straight line as the parabola 4 t (1 - t) c. The shift of f(z) is

    E f((z_r + z_x) / 2 + c + sqrt(v / 4) xi) - (f(z_r) + f(z_x)) / 2

and linear layers turn those of their inputs into c. The sum adds up for any S, and so for any c.

Three functions of this file are nodes of the rewritten graph. ``variance(x)`` is 0 at the reference
and (x - r)^2 at the sample; linear layers with squared weights turn it into v. ``mean_shift`` is
the shift of an activation, which has no multiplier. And ``activation(z, v, c, f, ...)`` is f(z),
with the multipliers S and T.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import accumulating
from fxshap.rules.core.caching import cached_between
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import RULES, Rule, Tensors, find_rule
from fxshap.rules.core.tracing import any_or_tracing

aten = torch.ops.aten

#: Functions that can be smoothed: they are defined everywhere and their slopes are bounded.
SMOOTHED = frozenset(
    {
        aten.relu, aten.relu6, aten.leaky_relu, aten.prelu, aten._prelu_kernel, aten.elu,
        aten.selu, aten.celu, aten.gelu, aten.silu, aten.mish, aten.hardswish, aten.hardsigmoid,
        aten.hardtanh, aten.clamp, aten.clip, aten.clamp_min, aten.clamp_max, aten.softplus,
        aten.softshrink, aten.sigmoid, aten.special_expit, aten.tanh, aten.log_sigmoid, aten.erf,
        aten.special_erf, aten.atan, aten.sin, aten.cos, aten.abs,
    }
)  # fmt: skip


def variance(x: Tensor) -> Tensor:
    """Return (x - r)^2 at the reference, which is 0."""
    return torch.zeros_like(x)


def no_variance(v: Tensor) -> Tensor:
    """Return the variances of a single endpoint, all 0, in the memory of one number."""
    return v.new_zeros((), dtype=accumulating(v.dtype)).expand_as(v)


def variance_rule(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """(x - r)^2 - 0 = (x - r) (x - r)."""
    (r,), (x,) = reference, sample
    return (grad * cached_between(operation, r, x, lambda: finite_change(r, x)),)


def finite_change(r: Tensor, x: Tensor) -> Tensor:
    """x - r, and 0 where an endpoint is infinite: masked values add no variance."""
    return (x - r).nan_to_num_(0.0, 0.0, 0.0)


def activation(
    z: Tensor,
    v: Tensor,
    shift: Tensor | None,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return ``function(z, *args, **kwargs)``; the moments matter to the rule only."""
    return function(z, *args, **kwargs)


def mean_shift(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return the shift of the mean of an activation at the reference, which is 0."""
    return torch.zeros_like(z)


def shift_between(
    r: Tensor,
    x: Tensor,
    v: Tensor,
    shift: Tensor | None,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Return how far the mean of an activation is from the middle of its endpoints.

    Half of the terms of its sum are switched. The mean of the sum is then that far from the middle
    of `r` and `x`, and the variance is a quarter of `v`.

    Parameters
    ----------
    r, x : Tensor
        The sum at both endpoints.
    v : Tensor
        Its variance.
    shift : Tensor or None
        How far its mean is from the middle; ``None`` for 0.
    function : callable
        The activation is ``function(z, *args, **kwargs)``.
    """
    middle = torch.lerp(r, x, 0.5) if shift is None else torch.lerp(r, x, 0.5) + shift
    deviation = (v / 2).sqrt_()  # sqrt 2 standard deviations
    total = function(middle, *args, **kwargs) * 2
    for z in (middle - deviation, middle + deviation):
        total += function(z, *args, **kwargs)
    endpoints = function(r, *args, **kwargs) + function(x, *args, **kwargs)
    result: Tensor = (total / 4 - endpoints / 2).nan_to_num_(0.0, 0.0, 0.0)
    return result


def activation_rule(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """S for the argument of the activation and T for its variance."""
    (r, *_), (x, v, *shifts) = reference, sample
    mean_slope, variance_slope = cached_between(
        operation, r, x, lambda: multipliers(operation, r, x, v, *shifts)
    )
    return grad * mean_slope, grad * variance_slope, *[None] * len(shifts)


#: How many times larger than at both endpoints, and than 1, an activation may be in between.
MAX_RATIO = 1e4


def multipliers(
    operation: Operation, r: Tensor, x: Tensor, v: Tensor, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return S and T of an ``activation`` node."""
    function = inner_function(operation)
    return smoothed_multipliers(partial(function_secant, function), function, r, x, v, shift)


def smoothed_multipliers(
    secant: Callable[[Tensor, Tensor], Tensor],
    function: Callable[[Tensor], Any],
    r: Tensor,
    x: Tensor,
    v: Tensor,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return S and T; the secant and 0 where `v` is too small for precise squares, or too large.

    A sum may be huge for some of its inputs but not for all of them. The activation then takes
    values far from both endpoints, which leave only their rounding errors in the attributions.

    Parameters
    ----------
    secant, function : callable
        ``secant(r, x)`` is the secant of ``function(z)``, a function of one number.
    r, x : Tensor
        The sum at both endpoints.
    v : Tensor
        Its variance.
    shift : Tensor, optional
        How far its mean is from the middle where half of its terms are switched.
    """
    deviation = (v / 3).sqrt_()  # sqrt 2 standard deviations
    slope = secant(r, x)
    if shift is None:
        smoothed = secant(r + deviation, x + deviation)
        smoothed += secant(r - deviation, x - deviation)
        smoothed = smoothed.add_(slope, alpha=2).div_(4)
    else:
        middle = torch.lerp(r, x, 0.5).add_(shift, alpha=4 / 3)
        smoothed = (secant(r, middle) + secant(middle, x)).mul_(2)
        for z_r, z, z_x in (
            (r + deviation, middle + deviation, x + deviation),
            (r - deviation, middle - deviation, x - deviation),
        ):
            smoothed += secant(z_r, z)
            smoothed += secant(z, z_x)
        smoothed.div_(8)
    rest = (slope - smoothed).mul_(finite_change(r, x)).div_(v)
    unsmoothed = v <= 1024 * torch.finfo(v.dtype).tiny
    largest = v.amax() if v.numel() else v.new_zeros(())
    if any_or_tracing(~(largest <= MAX_RATIO**2), rare=True):
        value = function(x)
        assert isinstance(value, Tensor)
        size = value.abs() + (slope * finite_change(r, x)).abs()
        fits = (
            (smoothed.abs() * deviation <= MAX_RATIO * (1 + size)) & rest.isfinite() & v.isfinite()
        )
        unsmoothed |= ~fits
    return torch.where(unsmoothed, slope, smoothed), rest.masked_fill_(unsmoothed, 0.0)


def inner_function(operation: Operation) -> Operation:
    """Return the operation whose activation an ``activation`` node computes."""
    (_, _, _, function, *args), kwargs = pytree.tree_unflatten(
        list(operation.arguments), operation.structure
    )
    return Operation.bind(function, (None, *args), kwargs, slots=(0,))[0]


def function_secant(function: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Return the secant of a univariate function, by its rule."""
    rule = find_rule(function.target)
    assert rule is not None and rule.backward is not None
    shape = torch.broadcast_shapes(r.shape, x.shape)
    (slope,) = rule.backward(function, (r,), (x,), r.new_ones(()).expand(shape))
    assert slope is not None
    return slope


RULES[variance] = Rule("variance", variance_rule, grads_batched=True)
RULES[activation] = Rule("smoothed activation", activation_rule, grads_batched=True)
