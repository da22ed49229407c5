"""Sums of products whose terms cancel, computed without losing digits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached
from fxshap.rules.core.correction import correct
from fxshap.rules.core.operation import Operation, vjp
from fxshap.rules.core.registry import Tensors
from fxshap.rules.core.secants import midpoint
from fxshap.rules.core.shapes import common_rows, in_rows, out_of_rows
from fxshap.rules.core.tracing import any_or_tracing, any_unless_tracing

#: How many times larger than at both ends, and than 1, a product of mixed ends may be.
MIXED = 1e4


#: How many times larger than what is not 0 at both ends: more costs the last digits of its change.
LOST = 1e6


def largest_other(ends: Tensor, mixed: float = MIXED) -> Tensor:
    """Return how large a number that neither end shows may be, for the larger size of the ends."""
    most = torch.minimum(mixed * ends.clamp(min=1), LOST * ends)
    return torch.where(ends == 0, mixed, most)


def may_cancel(a_r: Tensor, b_r: Tensor, a_x: Tensor, b_x: Tensor) -> Tensor:
    """Say whether a_r b_x may be more than :func:`most_beside` allows, by the extremes alone.

    Or no number, as the logarithm in ``where(a > 0, b * log(a), 0)``.
    """
    high_a, high_b = extremes(a_r)[1], extremes(b_x)[1]
    lost = (high_b > LOST * extremes(b_r)[0]) & (high_a > LOST * extremes(a_x)[0])
    return ~(high_a * high_b <= MIXED) | lost


def sequential_factors(
    reference: Tensors,
    sample: Tensors,
    sums: tuple[Tensor, Tensor],
    mixed: float = MIXED,
    most: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Let the factors of a product move in one order where the other passes something huge.

    The midpoint is the mean of both orders. A gate that is open at one end and shut at the other,
    where what it holds back is huge, passes in one of them a product that neither end has, and of
    which the attributions would hold only the rounding errors.

    Parameters
    ----------
    reference, sample : pair of Tensor
        Both factors at both ends.
    sums : pair of Tensor
        Each factor at the one end plus that at the other, which are returned where nothing is huge.
    mixed : float
        How many times larger than at both ends, and than 1, a product of mixed ends may be.
    most : Tensor, optional
        How large it may be, in place of that.
    """
    (a_r, b_r), (a_x, b_x) = reference, sample
    if most is None:
        most = largest_other(torch.maximum((a_r * b_r).abs(), (a_x * b_x).abs()), mixed)
    a_moves_first, b_moves_first = (a_r * b_x).abs() > most, (a_x * b_r).abs() > most
    a = torch.where(a_moves_first, 2 * a_x, torch.where(b_moves_first, 2 * a_r, sums[0]))
    b = torch.where(a_moves_first, 2 * b_r, torch.where(b_moves_first, 2 * b_x, sums[1]))
    return a, b


def sums_of_ends(reference: Tensors, sample: Tensors) -> tuple[Tensor, ...]:
    """Return both factors of a matrix product at the one end plus those at the other.

    Where mixed ends have something huge, also :func:`most_beside` both ends.
    """
    (a_r, b_r), (a_x, b_x) = reference, sample
    sums = a_r + a_x, b_r + b_x
    if not any_unless_tracing(largest_mixed((a_r, a_x), (b_r, b_x)) > MIXED):
        return sums
    a_r, b_r, a_x, b_x = (value.abs() for value in (a_r, b_r, a_x, b_x))
    most = largest_other(torch.maximum(a_r @ b_r, a_x @ b_x))
    return (*sums, most) if any_or_tracing((a_r @ b_x > most) | (a_x @ b_r > most)) else sums


def term_by_term(
    reference: Tensors, sample: Tensors, grad: Tensor, most: Tensor
) -> tuple[Tensor, Tensor]:
    """Multipliers of a matrix product, each of whose terms is one as of :func:`mul`.

    A weight of attention that vanishes where its value is huge, for one.
    """
    row, column = reference[0].dim() == 1, reference[1].dim() == 1
    half = grad * 0.5
    half, most = (v.unsqueeze(-1) if column else v for v in (half, most))
    half, most = (v.unsqueeze(-2) if row else v for v in (half, most))
    ends = [
        (a.unsqueeze(0) if row else a, b.unsqueeze(-1) if column else b)
        for a, b in (reference, sample)
    ]
    found_a, found_b = (torch.zeros_like(factor) for factor in ends[0])
    for k in range(found_a.shape[-1]):
        (a_r, b_r), (a_x, b_x) = ((a[..., k, None], b[..., k, None, :]) for a, b in ends)
        a, b = sequential_factors((a_r, b_r), (a_x, b_x), (a_r + a_x, b_r + b_x), most=most)
        found_a[..., k, None] = (half * b).sum_to_size(a_r.shape)
        found_b[..., k, None, :] = (half * a).sum_to_size(b_r.shape)
    return found_a.reshape(reference[0].shape), found_b.reshape(reference[1].shape)


def extremes(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest absolute value, computed once for an end."""

    def both(v: Tensor) -> tuple[Tensor, Tensor]:
        least, most = v.abs().aminmax() if v.numel() else (v.new_ones(()), v.new_zeros(()))
        return least, most

    return cached(value, "extremes", both)


FactorEndpoints = tuple[Tensor, Tensor]


def largest_mixed(a: FactorEndpoints, b: FactorEndpoints) -> Tensor:
    """Return what no product of mixed ends is larger than, by the extremes alone."""
    (a_r, a_x), (b_r, b_x) = ([extremes(end)[1] for end in factor] for factor in (a, b))
    return torch.maximum(a_r * b_x, a_x * b_r)


def midpoint_or_sequential(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any, places: tuple[int, int]
) -> tuple[Tensor | None, ...]:
    """Take the midpoint, where the factors at `places` are huge :func:`rows_in_one_order`."""
    if any_unless_tracing(largest_mixed(*((reference[p], sample[p]) for p in places)) > LOST):
        return sequential_factors_by_row(operation, reference, sample, grad, places)
    return midpoint(operation, reference, sample, grad)


def sequential_factors_by_row(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor, places: tuple[int, int]
) -> tuple[Tensor | None, ...]:
    """Let the factors of each row move in one order where the other passes something huge.

    As :func:`in_one_order`, for sums of products whose terms share an order. For t in [0, 1] the
    vector-Jacobian product at a = (1 - t) a_x + t a_r and b = t b_x + (1 - t) b_r restores the
    difference, with the weight t of the order in which b moves first. It is 1/2 at the midpoint,
    and 0 or 1 in rows whose other order passes more than :func:`most_beside` allows. Where both
    orders do, what is rounded is made up for as in :mod:`.generic`.

    Parameters
    ----------
    places : pair of int
        Where both factors are among the varying arguments.
    """
    sample = [x.expand_as(r) for r, x in zip(reference, sample, strict=True)]
    first, second = places

    def largest(*, swapped: int | None = None, at: Tensors = reference) -> Tensor:
        """Largest output of each row that is asked about, of shape (rows, 1)."""
        other = sample if at is reference else reference
        out = operation(*(other[p] if p == swapped else v for p, v in enumerate(at)))
        assert isinstance(out, Tensor)
        rows = in_rows(out.abs().masked_fill(grad == 0, 0.0), operation.rows[-1], count)
        return rows.amax(1, keepdim=True).nan_to_num(math.inf, math.inf)

    def spread(value: Tensor, place: int) -> Tensor:
        """Give a number of each row to all that a varying argument has of that row."""
        like = reference[place]
        wide = value.expand(count, like.numel() // count)
        return out_of_rows(wide, like, operation.rows[place])

    count = common_rows(reference, operation.rows[:-1], grad, operation.rows[-1])
    most = largest_other(torch.maximum(largest(), largest(at=sample)))
    most = most.clamp(max=torch.finfo(most.dtype).max)  # what overflows is more
    a_first, b_first = largest(swapped=first), largest(swapped=second)
    one, both = torch.maximum(a_first, b_first) > most, torch.minimum(a_first, b_first) > most
    t = torch.where(one, (a_first > b_first).to(grad.dtype), 0.5)
    point = [torch.lerp(r, x, 0.5) for r, x in zip(reference, sample, strict=True)]
    for place, weight in ((first, 1 - t), (second, t)):
        point[place] = torch.lerp(reference[place], sample[place], spread(weight, place))
    found = vjp(operation, point, grad)
    corrected = correct(operation, reference, sample, grad, list(found))
    return tuple(
        None if m is None or c is None else torch.where(spread(both, place), c, m)
        for place, (m, c) in enumerate(zip(found, corrected, strict=True))
    )
