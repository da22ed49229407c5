"""The smallest correction of multipliers that restores a finite difference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors
from fxshap.rules.core.shapes import common_batch_size, flatten_rows, unflatten_rows
from fxshap.rules.core.tracing import any_unless_tracing

#: Every round gains the digits of the dtype; very long steps lose them again.
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
    count = common_batch_size(reference, rows, before, output_row)
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        before, after, grad = (before,), (after,), (grad,)
    outputs = [
        [flatten_rows(value, output_row, count) for value in output]
        for output in zip(grad, before, after, strict=True)
        if output[0] is not None
    ]
    given = {index: m for index, m in enumerate(multipliers) if m is not None}
    if not given or not outputs:
        return tuple(multipliers)
    flat = [flatten_rows(m, rows[index], count) for index, m in given.items()]
    steps = [flatten_rows(sample[i] - reference[i], rows[i], count) for i in given]
    restored = restore_change(torch.cat(flat, 1), torch.cat(steps, 1), outputs)
    corrected = list(multipliers)
    for index, part in zip(given, restored.split([m.shape[1] for m in flat], 1), strict=True):
        corrected[index] = unflatten_rows(part, reference[index], rows[index])
    return tuple(corrected)


def restore_change(multipliers: Tensor, steps: Tensor, outputs: list[list[Tensor]]) -> Tensor:
    """Make `multipliers` restore the required change of all outputs.

    Rows whose required change overflows the dtype are computed in a larger unit, a power of two:
    the required change of a huge step may be infinite while its multiplier is not.

    Parameters
    ----------
    multipliers, steps : Tensor
        Of shape (rows, features).
    outputs : list of list of Tensor
        For each output its cotangent and its two endpoints, of shape (rows, elements).
    """
    required = required_change(outputs)
    if not any_unless_tracing(~required.isfinite()):
        return restore(drop_overflowing(multipliers, steps), steps, required)
    largest = torch.finfo(multipliers.dtype).max
    larger_unit = 2.0 ** (math.frexp(largest)[1] // 2)
    unit = torch.where(required.isfinite(), 1.0, larger_unit).to(required.dtype)
    required = required_change([[g, y_r / unit, y_x / unit] for g, y_r, y_x in outputs])
    return restore(drop_overflowing(multipliers / unit, steps), steps, required) * unit


def required_change(outputs: list[list[Tensor]]) -> Tensor:
    """Sum the cotangents times the changes of each row, to the shape (rows, 1)."""
    sums = [
        # An output whose cotangent is 0 may be infinite.
        (g * torch.where(g == 0, 0.0, y_x - y_r)).sum(1, keepdim=True)
        for g, y_r, y_x in outputs
    ]
    return torch.stack(sums).sum(0)


def drop_overflowing(multipliers: Tensor, steps: Tensor) -> Tensor:
    """Drop the multipliers that are too large, in rows whose attributions have no finite sum.

    Between two endpoints of ordinary size a product of many factors may overflow; such products
    only cancel.
    """
    attributions = multipliers * steps
    overflows = ~attributions.sum(1, keepdim=True).isfinite()
    bound = torch.finfo(multipliers.dtype).max / (4 * attributions.shape[1] + 4)
    return torch.where(overflows & ~(attributions.abs() < bound), 0.0, multipliers)


def restore(multipliers: Tensor, steps: Tensor, required: Tensor) -> Tensor:
    """Add to each row the smallest correction for which its attributions sum to `required`.

    The attributions are the multipliers times the steps.

    Parameters
    ----------
    multipliers, steps : Tensor
        Of shape (rows, features).
    required : Tensor
        Of shape (rows, 1).
    """
    longest = steps.abs().amax(1, keepdim=True)
    no_step = longest == 0
    unit = steps / longest.masked_fill(no_step, 1.0)  # the square of a step could overflow
    length = unit.square().sum(1, keepdim=True).clamp_min(1)
    for _ in range(ROUNDS):
        missing = required - (multipliers * steps).sum(1, keepdim=True)
        multipliers = multipliers + unit * (missing / length / longest).masked_fill(no_step, 0.0)
    return multipliers


def restore_along(
    dims: list[int], multipliers: Tensor, grad: Tensor, r: Tensor, x: Tensor, change: Tensor
) -> Tensor:
    """Make `multipliers` between r and x restore a change of outputs, along `dims`.

    This is for closed forms that lose digits where the two endpoints differ much in size.
    """
    last = list(range(-len(dims), 0))

    def flatten(value: Tensor) -> Tensor:
        return value.movedim(dims, last).flatten(last[0]).flatten(0, -2)

    steps = torch.where(x == r, 0.0, x - r)  # also where both are -inf
    required = (grad * change).sum(dims, keepdim=True)
    restored = restore(flatten(multipliers), flatten(steps), flatten(required))
    moved = multipliers.movedim(dims, last)
    return restored.reshape(moved.shape).movedim(last, dims)
