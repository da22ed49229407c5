"""Products of many factors, determinants and einsum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxshap.rules.core.cancellation import largest_other, midpoint_or_sequential
from fxshap.rules.core.correction import correct
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.secants import midpoint
from fxshap.rules.core.shapes import by_lines, lines_of
from fxshap.rules.core.tracing import any_unless_tracing

aten = torch.ops.aten


#: Points on the way through a product; more factors than twice as many are rounded.
MOST_POINTS = 64


def multilinear(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any, degree: int
) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian products averaged from reference to sample, for a product of many factors.

    What is linear in every factor is its own multilinear extension, whose gradient averaged along
    the diagonal is the Shapley value (Owen 1972, theorem 5). The gradient is of degree n - 1, which
    Gauss-Legendre quadrature integrates exactly with n / 2 points. Beyond :data:`MOST_POINTS` what
    is missing, and what is rounded, is made up for as in :mod:`.generic`.
    """
    points, weights = np.polynomial.legendre.leggauss(min(-(-degree // 2), MOST_POINTS))
    total = [torch.zeros_like(r) for r in reference]
    ends = [(r, x.expand_as(r)) for r, x in zip(reference, sample, strict=True)]
    for point, weight in zip(points, weights, strict=True):
        middle = [torch.lerp(r, x, float(point + 1) / 2) for r, x in ends]
        for place, found in enumerate(vjp(operation, middle, grad)):
            if found is not None:
                # What overflows on the way, or has no derivative there, counts nothing.
                total[place].add_(found.nan_to_num(0.0, 0.0, 0.0), alpha=float(weight) / 2)
    return correct(operation, reference, [x for _, x in ends], grad, list(total))


@rule(aten.prod, aten.cumprod, name="product of many")
def product_of_many(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Product along a dimension, or of everything so far; see :func:`multilinear`.

    Attributions that are more than :func:`most_beside` allows cancel: the path passes products that
    are huge where neither end is. Such lines, and those that overflow where every factor is as
    large as it ever is, take :func:`in_order_of_growth`.
    """
    (r,) = reference
    dim = operation.get("dim")
    degree = math.prod(r.shape) if dim is None else r.shape[dim] if r.dim() else 1
    found = multilinear(operation, reference, sample, grad, max(degree, 1))
    (m,) = found
    if m is None or m.is_complex() or not m.numel():
        return found
    so_far = operation.target is aten.cumprod.default
    g = lines_of(grad, dim) if so_far else grad.reshape(-1, 1)
    lines = [g, *(lines_of(end.expand_as(r), dim).to(g.dtype) for end in (r, *sample))]
    ends = [line.cumprod(-1) if so_far else line.prod(-1, keepdim=True) for line in lines[1:]]
    most = (g.abs() * largest_other(torch.maximum(*(end.abs() for end in ends)))).sum(-1)
    parts = lines_of(m, dim) * (lines[2] - lines[1])
    # What overflows on the way has been left out of the parts.
    farthest = torch.maximum(lines[1].abs(), lines[2].abs()).prod(-1)
    excess = ~(parts.abs().amax(-1) <= most) | ~farthest.isfinite()
    if not any_unless_tracing(excess):
        return found
    target = aten.cumprod.default if so_far else aten.prod.dim_int

    def usual(g: Tensor, r: Tensor, x: Tensor) -> Tensor:
        bound, _ = Operation.bind(target, (r, -1))
        (m,) = multilinear(bound, [r], [x], g if so_far else g.squeeze(-1), r.shape[-1])
        assert m is not None
        return m

    m = by_lines(dim, excess, usual, in_order_of_growth, *lines, like=r)
    return (m.to(r.dtype),)


def in_order_of_growth(grad: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """Multipliers of a product along the last dimension, or of all products so far.

    The factors move one by one, those that shrink most first. The product then falls, and after
    that rises, and is never larger than at one of the ends.

    Parameters
    ----------
    grad : Tensor
        Of one product a line, or of as many as there are factors.
    r, x : Tensor
        Of shape (lines, factors).
    """
    out = torch.zeros_like(r)
    growth = (x / r).abs().nan_to_num(1.0, math.inf)
    for j in range(grad.shape[-1]):
        count = j + 1 if grad.shape[-1] > 1 else r.shape[-1]
        order = growth[:, :count].argsort(dim=-1, stable=True)
        moved, waiting = x.gather(-1, order), r.gather(-1, order)
        one = torch.ones_like(moved[:, :1])
        before = torch.cat([one, moved[:, :-1]], -1).cumprod(-1)
        after = torch.cat([one, waiting[:, 1:].flip(-1)], -1).cumprod(-1).flip(-1)
        out.scatter_add_(-1, order, before * after * grad[:, j : j + 1])
    return out


@rule(aten.linalg_det, aten.det)
def determinant(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Linear in each entry, of degree the number of rows in all together: see :func:`multilinear`.

    Every term of the Leibniz formula is a product of different entries.
    """
    return multilinear(operation, reference, sample, grad, max(reference[0].shape[-1], 1))


@rule(aten.einsum, linear_in=(), name="product")
def einsum(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Midpoint for one or two computed operands, :func:`multilinear` for more."""
    if len(reference) == 2 and not grad.is_complex():
        return midpoint_or_sequential(operation, reference, sample, grad, (0, 1))
    if len(reference) <= 2:
        return midpoint(operation, reference, sample, grad)
    return multilinear(operation, reference, sample, grad, len(reference))
