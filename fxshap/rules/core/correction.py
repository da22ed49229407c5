"""The smallest correction that restores a finite difference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors
from fxshap.rules.core.shapes import common_rows, in_rows, out_of_rows
from fxshap.rules.core.tracing import any_unless_tracing

#: Every round gains the digits of the dtype, which very long steps take away again.
ROUNDS = 3


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
    owed = required_change(outputs)
    if not any_unless_tracing(~owed.isfinite()):
        return restore(without_overflow(multipliers, steps), steps, owed)
    largest = torch.finfo(multipliers.dtype).max
    unit = torch.where(owed.isfinite(), 1.0, 2.0 ** (math.frexp(largest)[1] // 2)).to(owed.dtype)
    owed = required_change([[g, y_r / unit, y_x / unit] for g, y_r, y_x in outputs])
    return restore(without_overflow(multipliers / unit, steps), steps, owed) * unit


def required_change(outputs: list[list[Tensor]]) -> Tensor:
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
