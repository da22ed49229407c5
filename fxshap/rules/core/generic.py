"""The rule of everything else: an averaged gradient, corrected to the finite difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.operation import Operation, differentiable, may_hold, rarely_holds, vjp
from fxshap.rules.core.registry import Rule, Tensors

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
                    # At a singularity on the way (an angle at the origin) only the ends count.
                    total.add_(step.nan_to_num(0.0, 0.0, 0.0), alpha=weight / len(ends))
    return correct(operation, reference, sample, grad, average)


def correct(
    operation: Operation,
    reference: Tensors,
    sample: Tensors,
    grad: Any,
    multipliers: list[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Add the smallest correction that makes `multipliers` restore the finite difference."""
    rows, output_row = operation.rows[: len(reference)], operation.rows[len(reference)]
    before, after = operation(*reference), operation(*sample)
    count = common_rows(reference, rows, before, output_row)
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        before, after, grad = (before,), (after,), (grad,)
    parts = [
        [in_rows(value, output_row, count) for value in part]
        for part in zip(grad, before, after, strict=True)
        if part[0] is not None
    ]
    moving = {place: m for place, m in enumerate(multipliers) if m is not None}
    if not moving or not parts:
        return tuple(multipliers)
    wide = [in_rows(m, rows[place], count) for place, m in moving.items()]
    steps = [in_rows(sample[place] - reference[place], rows[place], count) for place in moving]
    restored = restore_change(torch.cat(wide, 1), torch.cat(steps, 1), parts)
    corrected = list(multipliers)
    for place, part in zip(moving, restored.split([w.shape[1] for w in wide], 1), strict=True):
        corrected[place] = out_of_rows(part, reference[place], rows[place])
    return tuple(corrected)


def restore_change(multipliers: Tensor, steps: Tensor, outputs: list[list[Tensor]]) -> Tensor:
    """Make `multipliers` restore what is owed for each output: its cotangent and its two ends.

    Rows in which that is more than numbers of the type hold are counted in a larger unit, a power
    of two: what is owed for a huge step may be infinite while its multiplier is not.
    """
    owed = owed_for(outputs)
    if not rarely_holds(~owed.isfinite()):
        return restore(without_overflow(multipliers, steps), steps, owed)
    largest = torch.finfo(multipliers.dtype).max
    unit = torch.where(owed.isfinite(), 1.0, 2.0 ** (math.frexp(largest)[1] // 2)).to(owed.dtype)
    owed = owed_for([[g, y_r / unit, y_x / unit] for g, y_r, y_x in outputs])
    return restore(without_overflow(multipliers / unit, steps), steps, owed) * unit


def owed_for(outputs: list[list[Tensor]]) -> Tensor:
    """Sum the cotangents times the changes of each row, to the shape (rows, 1)."""
    found = [
        # What nobody asks about may be infinite.
        (g * torch.where(g == 0, 0.0, y_x - y_r)).sum(1, keepdim=True)
        for g, y_r, y_x in outputs
    ]
    return torch.stack(found).sum(0)


def without_overflow(multipliers: Tensor, steps: Tensor) -> Tensor:
    """Leave out of each row whose attributions have no finite sum those that are too large for it.

    Between two ends of ordinary size a product of many may pass what no number of the type holds,
    and only cancels.
    """
    parts = multipliers * steps
    lost = ~parts.sum(1, keepdim=True).isfinite()
    least = torch.finfo(multipliers.dtype).max / (4 * parts.shape[1] + 4)
    return torch.where(lost & ~(parts.abs() < least), 0.0, multipliers)


#: Every round gains the digits of the dtype, which very long steps take away again.
ROUNDS = 3


def restore(multipliers: Tensor, steps: Tensor, owed: Tensor) -> Tensor:
    """Add to each row the smallest correction for which its products with `steps` sum to `owed`.

    Parameters
    ----------
    multipliers, steps : Tensor
        Of shape (rows, features).
    owed : Tensor
        Of shape (rows, 1).
    """
    longest = steps.abs().amax(1, keepdim=True)
    still = longest == 0
    unit = steps / longest.masked_fill(still, 1.0)  # the square of a step could overflow
    length = unit.square().sum(1, keepdim=True).clamp_min(1)
    for _ in range(ROUNDS):
        missing = owed - (multipliers * steps).sum(1, keepdim=True)
        multipliers = multipliers + unit * (missing / length / longest).masked_fill(still, 0.0)
    return multipliers


def restore_along(
    dims: list[int], multipliers: Tensor, grad: Tensor, r: Tensor, x: Tensor, change: Tensor
) -> Tensor:
    """Make `multipliers` between r and x restore a change of outputs, along `dims`.

    For closed forms that lose digits where the two ends are of very different sizes.
    """
    last = list(range(-len(dims), 0))

    def flat(value: Tensor) -> Tensor:
        return value.movedim(dims, last).flatten(last[0]).flatten(0, -2)

    steps = torch.where(x == r, 0.0, x - r)  # also where both are -inf
    owed = (grad * change).sum(dims, keepdim=True)
    restored = restore(flat(multipliers), flat(steps), flat(owed))
    moved = multipliers.movedim(dims, last)
    return restored.reshape(moved.shape).movedim(last, dims)


Line = Callable[[Tensor, Tensor, Tensor], Tensor]


def lines_of(value: Tensor, dim: int | None) -> Tensor:
    """View as lines along `dim`, or as one line, of which an operation knows no other."""
    if dim is None or not value.dim():
        return value.reshape(1, -1)
    return value.movedim(dim, -1).reshape(-1, value.shape[dim])


def by_lines(
    dim: int | None, far: Tensor, usual: Line, other: Line, *lines: Tensor, like: Tensor
) -> Tensor:
    """Multiply each line of ``(grad, reference, sample)`` by itself: where `far` by `other`.

    Returned are multipliers in the shape of `like`.
    """
    out = torch.empty_like(lines[1])
    for multiply, chosen in ((usual, ~far), (other, far)):
        if may_hold(chosen):
            out[chosen] = multiply(*(line[chosen] for line in lines))
    if dim is None or not like.dim():
        return out.reshape(like.shape)
    return out.reshape(like.movedim(dim, -1).shape).movedim(-1, dim)


def common_rows(
    reference: Tensors, rows: Sequence[int | None], before: Any, output_row: int | None
) -> int:
    """Number of rows: tensors that fold others into the batch, (N, T) as N * T, count as N."""
    output = before if isinstance(before, Tensor) else before[0]
    pairs = [*zip(reference, rows, strict=True), (output, output_row)]
    sizes = (value.shape[row] if row is not None and value.dim() else 1 for value, row in pairs)
    return math.gcd(*sizes)


def in_rows(value: Tensor, row: int | None, count: int) -> Tensor:
    """View as `count` rows of real numbers, given the batch dimension `row`."""
    first = rows_first(value, row)
    first = torch.view_as_real(first.resolve_conj()) if value.is_complex() else first
    return first.reshape(count, -1)


def out_of_rows(value: Tensor, like: Tensor, row: int | None) -> Tensor:
    """Undo :func:`in_rows` for a value like `like`."""
    first = rows_first(like, row)
    if like.is_complex():
        value = torch.view_as_complex(value.reshape(*first.shape, 2))
    value = value.reshape(first.shape)
    return value if row is None or not like.dim() else value.movedim(0, row)


def rows_first(value: Tensor, row: int | None) -> Tensor:
    """Move the batch dimension, if there is one, to the front."""
    return value if row is None or not value.dim() else value.movedim(row, 0)


GENERIC = Rule("generic", generic, closed=False)
