"""Activations that know how the sum before them varies: nearer than a secant, as additive.

A secant gives all inputs of a unit z = sum_j w_j x_j one slope. The Shapley value of an input
averages over what the others have already added. With u_j = w_j (x_j - r_j) and t the share of
inputs that are there, their sum lies around z_r + t (z_x - z_r) with the variance
t (1 - t) v, v = sum_j u_j^2, which is v / 6 on the average over t (Ancona et al. 2019 lead such
variances through whole networks). So the slope is that of the activation f smoothed by it, and
what the smoothed change leaves of the change goes to the inputs by their u_j:

    m_j = w_j (S + T u_j),    S = secant of z -> E f(z + sqrt(v / 6) xi),
    T = (f(z_x) - f(z_r) - S (z_x - z_r)) / v

adds up: sum_j m_j (x_j - r_j) = S (z_x - z_r) + T v. The mean over a standard normal xi is taken
at -sqrt 2, 0 and sqrt 2 with the weights 1/4, 1/2 and 1/4, which have its first three moments.

The two functions of this file stand in the rewritten graph. ``variance(x)`` is 0 at the reference
and (x - r)^2 at the sample; linear layers with squared weights make v of it; and
``activation(z, v, f, ...)`` is f(z), with S and T for its multipliers.
"""

from __future__ import annotations

from collections.abc import Callable
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

#: Functions with bounded slopes, defined everywhere, which can be smoothed.
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
    """Stand for (x - r)^2, which is 0 at the reference."""
    return torch.zeros_like(x)


def no_variance(v: Tensor) -> Tensor:
    """Return the variances of one end alone, all 0, in the memory of one number."""
    return v.new_zeros((), dtype=accumulating(v.dtype)).expand_as(v)


def variance_rule(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """(x - r)^2 - 0 = (x - r) (x - r)."""
    (r,), (x,) = reference, sample
    return (grad * cached_between(operation, r, x, lambda: finite_change(r, x)),)


def finite_change(r: Tensor, x: Tensor) -> Tensor:
    """x - r, and 0 where an end is infinite: what is masked adds no variance."""
    return (x - r).nan_to_num_(0.0, 0.0, 0.0)


def activation(
    z: Tensor, v: Tensor, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Return ``function(z, *args, **kwargs)``, whatever the variance `v`."""
    return function(z, *args, **kwargs)


def activation_rule(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """S for what the activation receives and T for its variance."""
    (r, _), (x, v) = reference, sample
    of_mean, of_variance = cached_between(operation, r, x, lambda: multipliers(operation, r, x, v))
    return grad * of_mean, grad * of_variance


#: How many times larger than at both ends, and than 1, an activation may be in between.
MOST = 1e4


def multipliers(operation: Operation, r: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """S and T; the secant and 0 where `v` is too small to be squared right, or too large.

    Sums that are huge for some inputs alone, and not for all of them, pass an activation values
    that neither end has. Of what they add only rounding errors would be left in the attributions.
    """
    function, shift = function_of(operation), (v / 3).sqrt_()  # sqrt 2 standard deviations
    secant = secant_of(function, r, x)
    smoothed = secant_of(function, r + shift, x + shift)
    smoothed += secant_of(function, r - shift, x - shift)
    smoothed = smoothed.add_(secant, alpha=2).div_(4)
    rest = (secant - smoothed).mul_(finite_change(r, x)).div_(v)
    kept = v <= 1024 * torch.finfo(v.dtype).tiny
    largest = v.amax() if v.numel() else v.new_zeros(())
    if any_or_tracing(~(largest <= MOST**2)):
        value = function(x)
        assert isinstance(value, Tensor)
        ends = value.abs() + (secant * finite_change(r, x)).abs()
        fits = (smoothed.abs() * shift <= MOST * (1 + ends)) & rest.isfinite() & v.isfinite()
        kept |= ~fits
    return torch.where(kept, secant, smoothed), rest.masked_fill_(kept, 0.0)


def function_of(operation: Operation) -> Operation:
    """Return the function that an ``activation`` stands for."""
    (_, _, function, *args), kwargs = pytree.tree_unflatten(
        list(operation.arguments), operation.structure
    )
    return Operation.bind(function, (None, *args), kwargs, slots=(0,))[0]


def secant_of(function: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Return the secant of a univariate function, by its rule."""
    rule = find_rule(function.target)
    assert rule is not None and rule.backward is not None
    shape = torch.broadcast_shapes(r.shape, x.shape)
    (slope,) = rule.backward(function, (r,), (x,), r.new_ones(()).expand(shape))
    assert slope is not None
    return slope


RULES[variance] = Rule("variance", variance_rule, grads_batched=True)
RULES[activation] = Rule("smoothed activation", activation_rule, grads_batched=True)
