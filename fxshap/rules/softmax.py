"""Softmax and its family, through logsumexp, never through exp / sum / reciprocal.

With L = logsumexp(a), c the larger L of the two ends, e = exp(a - c), S = sum e = exp(L - c) and
D(d) = (1 - e^-|d|) / |d|, every divided difference of an exponential is its larger end times D:

    logsumexp    m_j = (dL / dS) (de_j / da_j) = max(e_j) D(da_j) / D(dL)
    log_softmax  u = a - L                              grad_j = g_j - m_j sum_i g_i
    softmax      l_i = dy_i / du_i = max(y_i) D(du_i)   grad_j = l_j g_j - m_j sum_i l_i g_i

All are bounded and invariant to shifts of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxshap.rules.core.caching import cached, cached_between, multiply_in_place
from fxshap.rules.core.correction import restore_along
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.shapes import by_lines, lines_of, reduced_dims, restore_dims
from fxshap.rules.core.tracing import any_unless_tracing
from fxshap.rules.univariate import mean_decay, sigmoid_slope

aten = torch.ops.aten


#: A change of logsumexp that costs two digits.
FAR = 100.0


class Row(NamedTuple):
    """What softmax needs of one end: its output y, the maximum of a row and the rest of L."""

    y: Tensor
    top: Tensor
    rest: Tensor


def row_of(a: Tensor, dims: list[int]) -> Row:
    """Split L = logsumexp(a) into the maximum and the rest; a row that is all -inf has y = 0."""
    top = a.amax(dims, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    e = (a - top).exp_()
    total = e.sum(dims, keepdim=True)
    return Row(e.div_(total.clamp_min(torch.finfo(a.dtype).tiny)), top, total.log())


def change_of_logsumexp(r: Row, x: Row) -> Tensor:
    """L_x - L_r; 0 where both are -inf."""
    return ((x.top - r.top) + (x.rest - r.rest)).nan_to_num_(0.0)


def softmax_slope(r: Tensor, x: Tensor, end_r: Row, end_x: Row) -> Tensor:
    """l_i = dy_i / du_i, with u_x - u_r = (x - r) - (L_x - L_r)."""
    change = change_of_logsumexp(end_r, end_x)
    return mean_decay(r + change, x).mul_(torch.maximum(end_r.y, end_x.y))


def logsumexp_slope(r: Tensor, x: Tensor, end_r: Row, end_x: Row) -> Tensor:
    """m_j = (dL / dS) (de_j / da_j)."""
    change = change_of_logsumexp(end_r, end_x)
    # e = y S, and S is 1 at the end with the larger L.
    s_r, s_x = (-change).clamp_(max=0).exp_(), change.clamp(max=0).exp_()
    decay = mean_decay(torch.zeros_like(change), change)
    # Divided last, so that a logit which is all of its row has a multiplier of exactly 1.
    return mean_decay(r, x).mul_(torch.maximum(end_r.y * s_r, end_x.y * s_x)).div_(decay)


def largest_change(r: Tensor, x: Tensor, end_r: Row, end_x: Row) -> Tensor:
    """The largest |L_x - L_r|, one number."""
    return change_of_logsumexp(end_r, end_x).abs().amax()


def slopes(
    operation: Operation,
    reference: Tensors,
    sample: Tensors,
    dtype: torch.dtype,
    *functions: Callable[[Tensor, Tensor, Row, Row], Tensor],
) -> tuple[Tensor, ...]:
    """Return slopes between both ends, in the dtype of the output."""
    (r,), (x,) = reference, sample

    def found() -> tuple[Tensor, ...]:
        rows = kept_row(operation, r, dtype), kept_row(operation, x, dtype)
        return tuple(slope(r.to(dtype), x.to(dtype), *rows) for slope in functions)

    return cached_between(operation, r, x, found)


def kept_row(operation: Operation, value: Tensor, dtype: torch.dtype) -> Row:
    """Return the row of one end."""
    dims = reduced_dims(operation, value)
    return cached(value, f"row {dims} {dtype}", lambda a: row_of(a.to(dtype), dims))


@rule(aten.logsumexp, aten.special_logsumexp)
def logsumexp(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """Log of the sum of exponentials over one or more dimensions."""
    (m,) = slopes(operation, reference, sample, grad.dtype, logsumexp_slope)
    return (multiply_in_place(m, restore_dims(operation, grad, reduced_dims(operation, m))),)


@rule(aten.logcumsumexp, closed=False, name="generic")
def logcumsumexp(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Logarithm of the sum of exponentials so far: the generic rule, except far apart.

    Where a number moves more than :data:`FAR`, every output is a :func:`logsumexp` of its own. The
    derivatives that the generic rule averages cancel there, and PyTorch's own, exp(a - L + log g),
    have lost the digits of log g where a is huge.
    """
    if grad.is_complex() or not grad.numel():
        return generic(operation, reference, sample, grad)
    (r,), dim = reference, operation["dim"]
    lines = [lines_of(end.expand_as(r), dim) for end in (grad, r, *sample)]
    far = (lines[2] - lines[1]).abs().amax(-1) > FAR
    if not any_unless_tracing(far):
        return generic(operation, reference, sample, grad)

    def near(g: Tensor, r: Tensor, x: Tensor) -> Tensor:
        (found,) = generic(Operation.bind(operation.target, (r, -1))[0], [r], [x], g)
        assert found is not None
        return found

    return (by_lines(dim, far, near, each_sum_so_far, *lines, like=r),)


def each_sum_so_far(grad: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """Multipliers of logcumsumexp along the last dimension, one output after another."""
    out = torch.zeros_like(grad)
    for j in range(grad.shape[-1]):
        to_r, to_x = r[..., : j + 1], x[..., : j + 1]
        slope = logsumexp_slope(to_r, to_x, row_of(to_r, [-1]), row_of(to_x, [-1]))
        out[..., : j + 1] += slope.mul_(grad[..., j, None])
    return out


@rule(aten.log_softmax, aten._log_softmax, aten.special_log_softmax)
def log_softmax(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """a - logsumexp(a)."""
    m, moved = slopes(operation, reference, sample, grad.dtype, logsumexp_slope, largest_change)
    dims = reduced_dims(operation, m)
    total = grad.sum(dims, keepdim=True)
    out = grad - multiply_in_place(m, total)
    if any_unless_tracing(moved > FAR):  # of the logit that is all of a row, m is as near to 1
        r, x = reference[0].to(grad.dtype), sample[0].to(grad.dtype)
        before, after = (log_of(kept_row(operation, end, grad.dtype), end) for end in (r, x))
        change = torch.where(before == after, 0.0, after - before)  # also where both are -inf
        out = restore_along(dims, out, grad, r, x, change)
    return (out.to(reference[0].dtype),)


def log_of(row: Row, a: Tensor) -> Tensor:
    """Return log_softmax(a), of whose row `row` is."""
    return (a - row.top) - row.rest


@rule(aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax)
def softmax(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """exp(a - logsumexp(a))."""
    own, m, moved = slopes(
        operation, reference, sample, grad.dtype, softmax_slope, logsumexp_slope, largest_change
    )
    dims = reduced_dims(operation, m)
    weighted = multiply_in_place(own, grad)
    total = weighted.sum(dims, keepdim=True)
    out = weighted.sub_(multiply_in_place(m, total))
    if any_unless_tracing(moved > FAR):  # m is so near to 1 that the difference is lost
        r, x = reference[0].to(grad.dtype), sample[0].to(grad.dtype)
        ys = [kept_row(operation, end, grad.dtype).y for end in (r, x)]
        out = restore_along(dims, out, grad, r, x, ys[1] - ys[0])
        out = without_excess(dims[0], out, grad, r, x, reach(dims[0], grad, *ys))
    return (out.to(reference[0].dtype),)


#: How many times more than softmax can change at all attributions of a row may be.
EXCESS = 1e4
#: How many times less than the range of the cotangent this is taken to be at least.
LEAST = 1e6


def reach(dim: int, grad: Tensor, y_r: Tensor, y_x: Tensor) -> Tensor:
    """Return how much softmax can change what is made of it: for every row, without `dim`.

    A cotangent only counts by how far it is from its mean, and where y is not 0 at both ends.
    """
    spread = grad.amax(dim) - grad.amin(dim)
    mean = (grad * ((y_r + y_x) / 2)).sum(dim, keepdim=True)
    most = (torch.maximum(y_r, y_x) * (grad - mean).abs()).sum(dim)
    return torch.maximum(most, spread / LEAST)


def without_excess(
    dim: int, multipliers: Tensor, grad: Tensor, r: Tensor, x: Tensor, reach: Tensor
) -> Tensor:
    """Let logits move one by one in rows that would have attributions that only cancel.

    Where all logits of a row move far and together, from (0, 0) to (c, c), say, the closed form
    gives +-c / 4, as the derivative does, and their sum holds no digits of what softmax changes.
    """
    found, g, r, x = (v.expand_as(multipliers).movedim(dim, -1) for v in (multipliers, grad, r, x))
    step = torch.where(x == r, 0.0, x - r)  # also where both are -inf
    most = (found * step).abs().amax(-1)
    excess = ~(most <= EXCESS * reach)  # also where they overflow
    if not excess.any():
        return multipliers
    rows = [value[excess] for value in (g, r, x)]
    backwards = logit_by_logit(*[value.flip(-1) for value in rows]).flip(-1)
    found = found.clone()
    found[excess] = (logit_by_logit(*rows) + backwards) / 2
    moved: Tensor = found.movedim(-1, dim)
    return moved


def logit_by_logit(grad: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """Multipliers of a softmax along the last dimension whose logits move in their order.

    While a_j moves, y_j is a logistic function of a_j - M, where M is the logsumexp of the others,
    and what y_j gains they lose: m_j = (g_j - mean of g over the others) ds / da_j. Sums telescope,
    and no attribution is larger than the range of g. The mean over all orders would be the Shapley
    value; an order and its reverse are exact for two logits.
    """
    out = torch.zeros_like(grad)
    others = r.clone()
    for j in range(r.shape[-1]):
        others[..., j] = -math.inf
        row = row_of(others, [-1])
        ends = [(end[..., j, None] - row.top - row.rest).squeeze(-1) for end in (r, x)]
        mean = (row.y * grad).sum(-1)
        out[..., j] = (grad[..., j] - mean) * sigmoid_slope(*ends)
        others[..., j] = x[..., j]
    return out.nan_to_num_(0.0)  # of what is at -inf with all others
