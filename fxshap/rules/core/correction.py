"""Corrections of multipliers that restore a finite difference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors
from fxshap.rules.core.shapes import common_batch_size, flatten_rows, unflatten_rows
from fxshap.rules.core.tracing import any_or_tracing, any_unless_tracing

#: Every round gains the digits of the dtype; very long steps lose them again.
ROUNDS = 3


def correct(
    operation: Operation,
    reference: Tensors,
    sample: Tensors,
    grad: Any,
    multipliers: list[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Correct `multipliers` in each row until they restore the finite difference."""
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
    """Share what the attributions of each row lack of `required` in proportion to their sizes.

    With the attributions a_j = m_j d_j, what is lacking changes a_j by the share |a_j| / sum |a_i|,
    so that features without an attribution get none:

        m_j += (required - sum_i a_i) sign(d_j) |m_j| / sum_i |a_i|

    Rows whose attributions are all 0 get :func:`smallest_correction`.

    Parameters
    ----------
    multipliers, steps : Tensor
        Of shape (rows, features).
    required : Tensor
        Of shape (rows, 1).
    """
    for _ in range(ROUNDS):
        attributions = multipliers * steps
        missing = required - attributions.sum(1, keepdim=True)
        largest = attributions.abs().amax(1, keepdim=True)
        shares = (attributions / largest).abs().sum(1, keepdim=True)
        shared = missing / shares / largest * multipliers.abs() * steps.sign()
        usable = shared.isfinite().all(1, keepdim=True)
        if any_or_tracing(~usable & (missing != 0)):
            smallest = smallest_correction(steps, missing)
            shared = torch.where(usable, shared, smallest)
        multipliers = multipliers + torch.where(missing == 0, 0.0, shared)
    return multipliers


def smallest_correction(steps: Tensor, missing: Tensor) -> Tensor:
    """Return the shortest vector per row whose product with the steps is `missing` (Broyden 1965).

    It is 0 in rows without a step.
    """
    longest = steps.abs().amax(1, keepdim=True)
    no_step = longest == 0
    unit = steps / longest.masked_fill(no_step, 1.0)  # the square of a step could overflow
    length = unit.square().sum(1, keepdim=True).clamp_min(1)
    return unit * (missing / length / longest).masked_fill(no_step, 0.0)


def restore_along(
    dims: list[int], multipliers: Tensor, grad: Tensor, r: Tensor, x: Tensor, change: Tensor
) -> Tensor:
    """Add the smallest correction that makes `multipliers` restore a change, along `dims`.

    This is for closed forms that lose digits where the two endpoints differ much in size.
    """
    last = list(range(-len(dims), 0))

    def flatten(value: Tensor) -> Tensor:
        return value.movedim(dims, last).flatten(last[0]).flatten(0, -2)

    steps = flatten(torch.where(x == r, 0.0, x - r))  # also where both are -inf
    required = flatten((grad * change).sum(dims, keepdim=True))
    restored = flatten(multipliers)
    for _ in range(ROUNDS):
        missing = required - (restored * steps).sum(1, keepdim=True)
        restored = restored + smallest_correction(steps, missing)
    moved = multipliers.movedim(dims, last)
    return restored.reshape(moved.shape).movedim(last, dims)
