"""The rule of everything else: an averaged gradient, corrected to the finite difference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.operation import Operation, differentiable, vjp
from fxshap.rules.table import Rule, Tensors

#: Nodes and weights of 3-point Gauss-Legendre quadrature on [0, 1].
GAUSS_LEGENDRE = ((0.1127016653792583, 5 / 18), (0.5, 8 / 18), (0.8872983346207417, 5 / 18))


def generic(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Average the vector-Jacobian products along the path and restore the finite difference.

    The average over 3 Gauss-Legendre points of the straight path from reference to sample is
    integrated gradients of one operation (Sundararajan et al. 2017, eq. 1). Indices and other
    arguments without a derivative are taken from either end and averaged. What the average lacks
    of the finite difference is added along the difference itself, the smallest correction that
    restores it, row by row (Broyden 1965, "good" update):

        grad_j += (<g, dy> - <grad, d>) * d_j / <d, d>
    """
    sample = [x.expand_as(r) for r, x in zip(reference, sample, strict=True)]
    moving = [differentiable(r) for r in reference]
    ends = (reference, sample) if not all(moving) else (reference,)
    average = [torch.zeros_like(r) if m else None for r, m in zip(reference, moving, strict=True)]
    for end in ends:
        for t, weight in GAUSS_LEGENDRE:
            point = [
                torch.lerp(r, x, t) if m else e
                for r, x, e, m in zip(reference, sample, end, moving, strict=True)
            ]
            for total, step in zip(average, vjp(operation, point, grad), strict=True):
                if total is not None and step is not None:
                    total.add_(step, alpha=weight / len(ends))
    return correct(operation, reference, sample, grad, average)


def correct(
    operation: Operation,
    reference: Tensors,
    sample: Tensors,
    grad: Any,
    multipliers: list[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Add the smallest correction that makes `multipliers` restore the finite difference."""
    *rows, output_row = operation.rows
    before, after = operation(*reference), operation(*sample)
    missing: Tensor | float = 0.0
    count = common_rows(reference, rows, before, output_row)
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        before, after, grad = (before,), (after,), (grad,)
    for g, y_r, y_x in zip(grad, before, after, strict=True):
        if g is not None:
            missing = missing + row_sums(inner(g, y_x - y_r), output_row, count)
    length: Tensor | float = 0.0
    steps: list[Tensor | None] = []
    for m, r, x, row in zip(multipliers, reference, sample, rows, strict=True):
        steps.append(None if m is None else x - r)
        if m is not None:
            missing = missing - row_sums(inner(m, x - r), row, count)
            length = length + row_sums(inner(x - r, x - r), row, count)
    if not isinstance(length, Tensor) or not isinstance(missing, Tensor):
        return tuple(multipliers)
    scale = torch.where(length == 0, 0.0, missing / length)
    return tuple(
        None if m is None or d is None else m + d * along(scale, d, row)
        for m, d, row in zip(multipliers, steps, rows, strict=True)
    )


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise real inner product, for autograd's convention of complex gradients."""
    return (a.conj() * b).real if a.is_complex() or b.is_complex() else a * b


def common_rows(reference: Tensors, rows: list[int], before: Any, output_row: int) -> int:
    """Number of rows: tensors that fold others into the batch, (N, T) as N * T, count as N."""
    output = before if isinstance(before, Tensor) else before[0]
    pairs = [*zip(reference, rows, strict=True), (output, output_row)]
    return math.gcd(*(value.shape[row] if value.dim() else 1 for value, row in pairs))


def row_sums(value: Tensor, row: int, count: int) -> Tensor:
    """Sum over all but the batch dimension `row`, for `count` rows."""
    return (value.movedim(row, 0) if value.dim() else value).reshape(count, -1).sum(1)


def along(scale: Tensor, like: Tensor, row: int) -> Tensor:
    """View one number a row so that it broadcasts along dimension `row` of `like`."""
    if like.dim() == 0:
        return scale.squeeze()
    scale = scale.repeat_interleave(like.shape[row] // len(scale))
    return scale.reshape([-1 if dim == row else 1 for dim in range(like.dim())])


GENERIC = Rule("generic", generic, closed=False)
