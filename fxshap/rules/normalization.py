"""Layer, group, instance and RMS norms, variances and vector norms.

A norm divides c = a - mean(a) by t = sqrt(mean(c^2) + eps). With a bar for the mean of both ends
y t = c gives dy = (dc - y_bar dt) / t_bar, t^2 = mean(c^2) + eps gives dt = mean(c_bar dc) / t_bar:

    grad_c = (g - c_bar sum(g y_bar) / (n t_bar)) / t_bar
    grad_a = grad_c - mean(grad_c)

This is the midpoint rule for y and t, whose product is c. That for c and 1/t adds up as well, but
where c nearly vanishes at one end, as for a black image, its two terms are of the size of 1/t at
that end and cancel: that is 20 to 90 times off the Shapley values, against 0.2 to 0.4 here
(``tests/property/test_rule_fuzz.py::test_norms_are_near_shapley_values_from_every_reference``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached, cached_between
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.shapes import reduced_dims, restore_dims
from fxshap.rules.maximum import over_dims
from fxshap.rules.univariate import abs_slope, positive_power_slope, sqrt_slope

aten = torch.ops.aten


def standardise(
    operation: Operation, r: Tensor, x: Tensor, grad: Tensor, eps: float, *, centred: bool = True
) -> Tensor:
    """Multiply through c / sqrt(mean(c^2) + eps) over the last dimension."""

    def slopes() -> tuple[Tensor, Tensor, Tensor]:
        """2 c_bar, 2 y_bar and 2 t_bar."""
        moments = keep_moments if centred else keep_square
        (mean_r, s_r), (mean_x, s_x) = (moments(value) for value in (r, x))
        t_r, t_x = (s_r + eps).sqrt(), (s_x + eps).sqrt()
        c_r, c_x = r - mean_r, x - mean_x
        outputs = (c_r / t_r).add_(c_x / t_x)
        return c_r.add_(c_x), outputs, t_r + t_x

    middle, outputs, total = cached_between(operation, r, x, slopes)
    along = (grad * outputs).sum(-1, keepdim=True).div_(-2 * r.shape[-1] * total)
    out = torch.addcmul(grad, middle, along).mul_(2 / total)
    return out.sub_(out.mean(-1, keepdim=True)) if centred else out


def keep_moments(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the mean square about it, over the last dimension."""

    def moments(value: Tensor) -> tuple[Tensor, Tensor]:
        mean = value.mean(-1, keepdim=True)
        return mean, (value - mean).square_().mean(-1, keepdim=True)

    return cached(value, "moments", moments)


def keep_square(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return 0 and the mean square, over the last dimension."""
    square = cached(value, "square", lambda value: value.square().mean(-1, keepdim=True))
    return torch.zeros_like(square), square


def standardise_groups(
    operation: Operation, r: Tensor, x: Tensor, grad: Tensor, groups: int
) -> Tensor:
    """Multiply through (N, C, ...) standardised as (N, groups, everything else)."""
    ends = (value.reshape(value.shape[0], groups, -1) for value in (r, x, grad))
    flat_r, flat_x, flat_grad = ends
    return standardise(operation, flat_r, flat_x, flat_grad, operation["eps"]).reshape(r.shape)


def per_channel(weight: Tensor | None, like: Tensor) -> Tensor | float:
    """View a channel weight so that it broadcasts against (N, C, ...)."""
    return 1.0 if weight is None else weight.reshape([-1] + [1] * (like.dim() - 2))


def flat(value: Tensor, last: int) -> Tensor:
    """Flatten the last dimensions; a single one is the tensor itself, with what is kept of it."""
    return value if last == 1 else value.flatten(-last)


@rule(aten.layer_norm, aten.rms_norm)
def layer_norm(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Layer norm (Ba et al. 2016) and, without centring, RMS norm (Zhang and Sennrich 2019)."""
    if operation.slots != (0,):
        return generic(operation, reference, sample, grad)
    (r,), (x,) = reference, sample
    centred = operation.get("bias", "rms") != "rms"
    last = len(operation["normalized_shape"])
    weight, eps = operation["weight"], operation["eps"]
    eps = torch.finfo(r.dtype).eps if eps is None else eps
    grad = grad if weight is None else grad * weight
    flat_r, flat_x, flat_grad = (flat(value, last) for value in (r, x, grad))
    out = standardise(operation, flat_r, flat_x, flat_grad, eps, centred=centred)
    return (out.reshape(r.shape),)


@rule(aten.group_norm)
def group_norm(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Group norm (Wu and He 2018)."""
    if operation.slots != (0,):
        return generic(operation, reference, sample, grad)
    (r,), (x,) = reference, sample
    grad = grad * per_channel(operation["weight"], r)
    return (standardise_groups(operation, r, x, grad, operation["num_groups"]),)


@rule(aten.instance_norm)
def instance_norm(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Instance norm (Ulyanov et al. 2016); with running statistics it is linear."""
    if operation.slots != (0,) or not operation["use_input_stats"]:
        return generic(operation, reference, sample, grad)
    (r,), (x,) = reference, sample
    grad = grad * per_channel(operation["weight"], r)
    return (standardise_groups(operation, r, x, grad, r.shape[1]),)


# --- variances --------------------------------------------------------------------------------


def spread(operation: Operation, r: Tensor, x: Tensor, grad: Tensor, *, root: bool) -> Tensor:
    """Variance, or its square root: centre, square, sum, divide by n - correction."""
    dims = reduced_dims(operation, r)
    grad = restore_dims(operation, grad, dims)
    correction = operation.get("correction", 1 if operation.get("unbiased", True) else 0)
    count = math.prod(r.shape[dim] for dim in dims) - (1 if correction is None else correction)
    c_r, c_x = (value - value.mean(dims, keepdim=True) for value in (r, x))
    if root:
        grad = grad * sqrt_slope(*(c.square().sum(dims, keepdim=True) / count for c in (c_r, c_x)))
    out = grad * (c_x + c_r) / count
    return out - out.mean(dims, keepdim=True)


@rule(aten.var)
def var(operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor) -> tuple[Tensor]:
    """Variance over dimensions."""
    return (spread(operation, reference[0], sample[0], grad, root=False),)


@rule(aten.std)
def std(operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor) -> tuple[Tensor]:
    """Standard deviation over dimensions."""
    return (spread(operation, reference[0], sample[0], grad, root=True),)


@rule(aten.var_mean, aten.std_mean)
def spread_and_mean(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor]:
    """Variance or standard deviation, and the mean."""
    (r,), (x,) = reference, sample
    root = "std" in str(operation.target)
    g_spread, g_mean = grad
    total = torch.zeros_like(r)
    if g_spread is not None:
        total = total + spread(operation, r, x, g_spread, root=root)
    if g_mean is not None:
        dims = reduced_dims(operation, r)
        count = math.prod(r.shape[dim] for dim in dims)
        total = total + restore_dims(operation, g_mean, dims) / count
    return (total,)


# --- vector norms -----------------------------------------------------------------------------


@rule(aten.linalg_vector_norm, aten.norm)
def vector_norm(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """(sum |a|^p)^(1/p); p = inf is the largest |a| and p = -inf the smallest."""
    (r,), (x,) = reference, sample
    order = operation.get("ord", operation.get("p", 2))
    order = 2 if order is None else order
    if order == 0:  # counts what is not 0
        return generic(operation, reference, sample, grad)
    dims = reduced_dims(operation, r)
    grad = restore_dims(operation, grad, dims)
    if order == 2:
        s_r, s_x = (value.square().sum(dims, keepdim=True) for value in (r, x))
        return (grad * sqrt_slope(s_r, s_x) * (x + r),)
    a_r, a_x = r.abs(), x.abs()
    if math.isinf(order):
        sign = 1 if order > 0 else -1
        grad = over_dims(sign * a_r, sign * a_x, grad, dims)
    elif order != 1:
        s_r, s_x = (a.pow(order).sum(dims, keepdim=True) for a in (a_r, a_x))
        root = positive_power_slope(s_r, s_x, 1 / order)
        grad = grad * root * positive_power_slope(a_r, a_x, order)
    return (grad * abs_slope(r, x),)
