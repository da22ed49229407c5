"""Secants of functions of one number, (f(x) - f(r)) / (x - r), without cancellation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxshap.rules.core.blocks import in_blocks
from fxshap.rules.core.caching import multiply_in_place
from fxshap.rules.core.generic import GAUSS_LEGENDRE
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import Tensors
from fxshap.rules.core.tracing import (
    any_or_tracing,
    any_unless_tracing,
    avoids_reading,
    is_tracing_rules,
)


def scale(grad: Tensor, slope: Tensor) -> Tensor:
    """Return ``grad * slope`` with 0 * inf = 0: an unbounded slope matters only if it is used."""
    if any_or_tracing(~slope.isfinite()):
        return torch.where(grad == 0, 0.0, grad * slope)
    return multiply_in_place(slope, grad)


def multiply_unbounded(
    operation: Operation, r: Tensor, x: Tensor, grad: Tensor, slope: Tensor
) -> Tensor:
    """Return ``grad * slope`` where the slope overflows but its product with `grad` does not."""
    f_r, f_x = values_at(operation, r, x)
    product = scale(grad, slope)
    return torch.where(product.isfinite() | (x == r), product, grad * (f_x - f_r) / (x - r))


def values_at(operation: Operation, r: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values of an operation with one output at both endpoints."""
    f_x, f_r = operation(x), operation(r)
    assert isinstance(f_x, Tensor) and isinstance(f_r, Tensor)
    return f_r, f_x


def quotient(change: Tensor, step: Tensor) -> Tensor:
    """Return change / step; of complex numbers also where the square of the step underflows."""
    if not step.is_complex():
        return change / step
    unit = step.abs()
    direction = torch.where(step == 0, 1.0, divide_parts(step, unit))
    return divide_parts(change / direction, unit)


def divide_parts(z: Tensor, divisor: Tensor) -> Tensor:
    """Return z / divisor for a real divisor, at most the largest number of the dtype."""
    parts = torch.view_as_real(z.resolve_conj()) / divisor.unsqueeze(-1)
    return torch.view_as_complex(parts.nan_to_num())


def derivative(operation: Operation, point: Tensor) -> Tensor:
    """f'(point) of a univariate operation, real or holomorphic, by autograd.

    The gradient of a holomorphic function in PyTorch is the conjugate of f'.
    """
    (result,) = vjp(operation, (point,), torch.ones_like(point))
    assert result is not None
    return result.conj()


def smooth_secant(r: Tensor, x: Tensor, operation: Operation) -> Tensor:
    """Secant of any function, smooth or with kinks, without the rounding noise of the quotient.

    That of a holomorphic function is a complex number.

    The 3-point Gauss-Legendre mean of f' replaces the quotient wherever the two differ by less
    than the quotient's own rounding error, so it never costs more than that error. Where the mean
    is wrong (at a kink, or far apart) it differs by more, and the quotient stays.
    """
    x, r = torch.broadcast_tensors(x, r)
    d = x - r
    f_r, f_x = values_at(operation, r, x)
    exact = quotient(f_x - f_r, d)
    mean = sum(weight * derivative(operation, torch.lerp(r, x, t)) for t, weight in GAUSS_LEGENDRE)
    assert isinstance(mean, Tensor)
    if mean.is_complex():  # near removable singularities torch has no derivative
        mean = torch.where(mean.isnan(), 0.0, mean)
    # What only the rounding of f can change: more would show in the sum of the attributions.
    noise = 4 * torch.finfo(d.dtype).eps * (f_x.abs() + f_r.abs())
    close = (mean * d - (f_x - f_r)).abs() <= noise
    return torch.where(close | (d == 0), mean, exact)


def piecewise_secant(r: Tensor, x: Tensor, operation: Operation) -> Tensor:
    """The quotient wherever x != r, for functions whose values are exact near their kinks."""
    d = x - r
    f_r, f_x = values_at(operation, r, x)
    equal = d == 0
    slope = (f_x - f_r) / d
    if any_or_tracing(equal):
        slope = torch.where(equal, derivative(operation, r), slope)
    return slope


def step_secant(r: Tensor, x: Tensor, operation: Operation) -> Tensor:
    """Secant of a function that is constant between its jumps: 0 where no jump is crossed."""
    f_r, f_x = values_at(operation, r, x)
    change = f_x - f_r
    return torch.where(change == 0, 0.0, change / (x - r))


def linear_with_kink_secant(r: Tensor, x: Tensor, operation: Operation) -> Tensor:
    """Secant of a function with two straight pieces that meet at 0: exact within one piece."""
    slope = piecewise_secant(r, x, operation)
    same_piece = (x > 0) == (r > 0)
    return torch.where(same_piece, derivative(operation, r.expand_as(slope)), slope)


#: Endpoints are close where |d| (1 + |c|) is less, for their difference d and midpoint c. A larger
#: bound is more precise around it and slower, because more elements take the form that does not
#: cancel; tests/rules/test_gelu.py checks the precision.
CLOSE = 0.05
#: The largest share of the endpoints that may be close where their number is not read.
MAX_CLOSE_SHARE = 0.25


def replace_where_close(
    slope: Tensor, r: Tensor, x: Tensor, close: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Replace a slope by ``close(r, x)`` where its quotient cancels.

    Few elements are that close, so `close` is computed for those only.
    """
    is_close = in_blocks(are_close, r, x, dtype=torch.bool)
    if is_tracing_rules():
        return torch.where(is_close, close(r, x), slope)
    slope = slope.contiguous()
    flat, is_close = slope.view(-1), is_close.flatten()
    padded = avoids_reading(slope)
    index = (
        indices_of_few(is_close, math.ceil(len(flat) * MAX_CLOSE_SHARE))
        if padded
        else indices_where(is_close)
    )
    if len(index):
        values = close(*(take_broadcast(value, slope.shape, index) for value in (r, x)))
        flat[index] = torch.where(is_close[index], values, flat[index]) if padded else values
    return slope


def are_close(r: Tensor, x: Tensor) -> Tensor:
    """Return whether |d| (1 + |c|) is less than :data:`CLOSE`."""
    return (x + r).abs_().add_(2).mul_(x - r).abs_() < 2 * CLOSE


def indices_where(condition: Tensor) -> Tensor:
    """Return the indices where a condition of shape (n,) holds."""
    if condition.is_cpu:  # NumPy is faster where it holds rarely
        return torch.from_numpy(np.flatnonzero(condition.numpy()))
    return condition.nonzero().squeeze(1)


def take_broadcast(value: Tensor, shape: torch.Size, index: Tensor) -> Tensor:
    """Return the elements of a value at indices of the flattened shape to which it broadcasts."""
    size = value.numel()
    if value.dim() and value.shape[1:] == shape[1:] and value.dim() == len(shape):
        return value.reshape(-1)[index if size == shape.numel() else index % size]
    return value.expand(shape).reshape(-1)[index]


def indices_of_few(condition: Tensor, most: int) -> Tensor:
    """Return `most` indices: those where a condition holds, and the first of them again.

    Their number is not read, but recorded as a condition if it is more. Where the condition holds
    nowhere, all indices are 0.

    Parameters
    ----------
    condition : Tensor
        Booleans of shape (n,).
    most : int
        At most n.
    """
    if not most:
        return condition.new_zeros(0, dtype=torch.long)
    number = condition.cumsum(0)
    any_unless_tracing(number[-1] > most)
    slot = torch.where(condition & (number <= most), number - 1, most)
    index = torch.zeros(most + 1, dtype=torch.long, device=condition.device)
    index.scatter_(0, slot, torch.arange(len(condition), device=condition.device))
    used = torch.arange(most, device=condition.device) < number[-1]
    return torch.where(used, index[:-1], torch.where(number[-1] > 0, index[0], 0))


def midpoint(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product at the midpoint, exact for operations of degree two."""
    middle = [torch.lerp(r, x.expand_as(r), 0.5) for r, x in zip(reference, sample, strict=True)]
    return vjp(operation, middle, grad)
