"""The rule of operations without one of their own: an averaged gradient with a correction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import differentiable
from fxshap.rules.core.correction import correct
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import Rule, Tensors
from fxshap.rules.core.tracing import any_unless_tracing

#: Nodes and weights of 3-point Gauss-Legendre quadrature on [0, 1].
GAUSS_LEGENDRE = ((0.1127016653792583, 5 / 18), (0.5, 8 / 18), (0.8872983346207417, 5 / 18))

#: Its multiples modulo 1 mix two endpoints without a pattern.
GOLDEN_RATIO = 0.6180339887498949


def generic(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Average the vector-Jacobian products along the path and restore the finite difference.

    The average over 3 Gauss-Legendre points of the straight path from reference to sample is
    integrated gradients of one operation (Sundararajan et al. 2017, eq. 1). Indices and other
    arguments without a derivative are taken from either endpoint, and the results averaged. What
    the average lacks of the finite difference is shared row by row in proportion to the
    attributions, so that what does not matter to the output gets nothing:

        grad_j += (<g, dy> - <grad, d>) sign(d_j) |grad_j| / sum_i |grad_i d_i|

    An operation that maps every element by itself, as an activation that is one operator, has the
    secant of each element instead: see :func:`elementwise_secant`.
    """
    # Contiguous, as not every operator serves other strides, nor does every derivative.
    reference = [r.contiguous() for r in reference]
    sample = [x.expand_as(r).contiguous() for r, x in zip(reference, sample, strict=True)]
    grad = pytree.tree_map_only(Tensor, Tensor.contiguous, grad)
    if len(reference) == 1 and isinstance(grad, Tensor):
        multiplier = elementwise_secant(operation, reference[0], sample[0], grad)
        if multiplier is not None:
            return (multiplier,)
    average = averaged_gradient(operation, reference, sample, grad)
    return correct(operation, reference, sample, grad, average)


def averaged_gradient(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> list[Tensor | None]:
    """Return the mean vector-Jacobian product along the path from reference to sample."""
    moving = [differentiable(r) for r in reference]
    constants = (reference,) if all(moving) else (reference, sample)
    average = [torch.zeros_like(r) if m else None for r, m in zip(reference, moving, strict=True)]
    for endpoint in constants:
        for t, weight in GAUSS_LEGENDRE:
            point = [
                torch.lerp(r, x, t) if m else constant
                for r, x, constant, m in zip(reference, sample, endpoint, moving, strict=True)
            ]
            for total, part in zip(average, vjp(operation, point, grad), strict=True):
                if total is not None and part is not None:
                    # At a singularity on the path (an angle at 0) only the endpoints count.
                    total.add_(part.nan_to_num(0.0, 0.0, 0.0), alpha=weight / len(constants))
    return average


def elementwise_secant(operation: Operation, r: Tensor, x: Tensor, grad: Tensor) -> Tensor | None:
    """Return the cotangent of an operation that maps every real element by itself.

    ``None`` for another operation. It is one that does, between these endpoints, if at a mixture of
    both every element of the output is that of the endpoint which its input comes from, and an
    element of the output is the same at both endpoints where its input is. The
    multiplier (f(x) - f(r)) / (x - r) is replaced by the averaged gradient where they agree to
    rounding, as in :func:`.secants.smooth_secant`.
    """
    if not differentiable(r) or r.is_complex() or grad.shape != r.shape or grad.is_complex():
        return None
    unmoved = r == x
    index = (~unmoved).flatten().cumsum(0).reshape(r.shape)  # of the elements that differ
    from_sample = index * GOLDEN_RATIO % 1 < 0.5
    mixtures = torch.where(from_sample, x, r), torch.where(from_sample, r, x)
    try:
        f_r, f_x, *mixed = (single_output(operation, point) for point in (r, x, *mixtures))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it needs what a mixture need not have, such as a positive definite matrix
        return None
    expected = torch.where(from_sample, f_x, f_r), torch.where(from_sample, f_r, f_x)
    equal = [torch.isclose(a, b, 0, 0, True) for a, b in zip(mixed, expected, strict=True)]
    equal.append(~unmoved | torch.isclose(f_r, f_x, 0, 0, True))
    if not any_unless_tracing(torch.stack(equal).all()):
        return None
    (mean,) = averaged_gradient(operation, [r], [x], torch.ones_like(f_r))
    assert mean is not None
    step, change = x - r, f_x - f_r
    close = (mean * step - change).abs() <= 4 * torch.finfo(r.dtype).eps * (f_x.abs() + f_r.abs())
    slope = torch.where(close | (step == 0), mean, change / step)
    return torch.where(grad == 0, 0.0, grad * slope)


def single_output(operation: Operation, point: Tensor) -> Tensor:
    """Return the output of an operation that has one."""
    output = operation(point)
    assert isinstance(output, Tensor)
    return output


GENERIC = Rule("generic", generic, closed_form=False)
