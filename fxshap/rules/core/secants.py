"""Divided differences of functions of one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.caching import multiply_in_place
from fxshap.rules.core.generic import GAUSS_LEGENDRE
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import SecantFn, Tensors
from fxshap.rules.core.tracing import any_or_tracing, is_tracing_rules


def scale(grad: Tensor, slope: Tensor) -> Tensor:
    """Multiply, with 0 * inf = 0: an unbounded slope that nobody asks about stays silent."""
    if any_or_tracing(~slope.isfinite()):
        return torch.where(grad == 0, 0.0, grad * slope)
    return multiply_in_place(slope, grad)


def without_overflow(
    operation: Operation, r: Tensor, x: Tensor, grad: Tensor, slope: Tensor
) -> Tensor:
    """Multiply a slope that no number holds by a cotangent that makes it one."""
    f_x, f_r = operation(x), operation(r)
    assert isinstance(f_x, Tensor) and isinstance(f_r, Tensor)
    product = scale(grad, slope)
    return torch.where(product.isfinite() | (x == r), product, grad * (f_x - f_r) / (x - r))


def derivative(operation: Operation, point: Tensor) -> Tensor:
    """f'(point) of a univariate operation, by autograd."""
    (result,) = vjp(operation, (point,), torch.ones_like(point))
    assert result is not None
    return result


def smooth_secant(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of any function, smooth or kinked, without the noise of the quotient.

    The 3-point Gauss-Legendre mean of f' replaces the quotient wherever the two differ by less
    than the quotient's own rounding error, so it can never cost more than that error; where the
    mean is wrong (at a kink, or far apart) it differs by more and the quotient stays.
    """
    x, r = torch.broadcast_tensors(x, r)
    d = x - r
    f_x, f_r = operation(x), operation(r)
    assert isinstance(f_x, Tensor) and isinstance(f_r, Tensor)
    quotient = (f_x - f_r) / d
    mean = sum(weight * derivative(operation, torch.lerp(r, x, t)) for t, weight in GAUSS_LEGENDRE)
    assert isinstance(mean, Tensor)
    # What the rounding of f alone can change: more would show in the sum of the attributions.
    noise = 4 * torch.finfo(d.dtype).eps * (f_x.abs() + f_r.abs())
    close = (mean * d - (f_x - f_r)).abs() <= noise
    return torch.where(close | (d == 0), mean, quotient)


def piecewise_secant(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant at every d != 0, for functions whose values are exact near their kinks."""
    d = x - r
    f_x, f_r = operation(x), operation(r)
    assert isinstance(f_x, Tensor) and isinstance(f_r, Tensor)
    same = d == 0
    slope = (f_x - f_r) / d
    if any_or_tracing(same):
        slope = torch.where(same, derivative(operation, r), slope)
    return slope


def step_secant(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Secant of a function that is constant between its jumps: 0 where nothing is crossed."""
    f_x, f_r = operation(x), operation(r)
    assert isinstance(f_x, Tensor) and isinstance(f_r, Tensor)
    change = f_x - f_r
    return torch.where(change == 0, 0.0, change / (x - r))


def piecewise_linear(*kinks: Callable[[Operation], float]) -> SecantFn:
    """Slope of a function with straight pieces between `kinks`: exact within one piece."""

    def straight(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
        slope = piecewise_secant(operation, r, x)
        same_piece = torch.ones_like(slope, dtype=torch.bool)
        for kink in kinks:
            at = kink(operation)
            same_piece &= (x > at) == (r > at)
        return torch.where(same_piece, derivative(operation, r.expand_as(slope)), slope)

    return straight


#: Ends are close where |d| (1 + |c|) is less. A larger bound is more precise around it and slower,
#: for more places take the form that does not cancel; tests/rules/test_gelu.py holds the precision.
CLOSE = 0.05


def replace_close(slope: Tensor, r: Tensor, x: Tensor, close: Callable[..., Tensor]) -> Tensor:
    """Put ``close(r, x)`` where the quotient would cancel: in few places, so in those alone."""
    size = (x + r).abs_().mul_(0.5).add_(1).mul_((x - r).abs_())
    if is_tracing_rules():
        return torch.where(size < CLOSE, close(r, x), slope)
    places = size.flatten().lt(CLOSE).nonzero().squeeze(1)
    slope = slope.contiguous()
    if len(places):
        at_r, at_x = (end.expand_as(slope).reshape(-1)[places] for end in (r, x))
        slope.view(-1)[places] = close(at_r, at_x)
    return slope


def midpoint(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product at the midpoint, exact for operations of degree two."""
    middle = [torch.lerp(r, x.expand_as(r), 0.5) for r, x in zip(reference, sample, strict=True)]
    return vjp(operation, middle, grad)
