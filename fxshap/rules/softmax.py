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
from typing import NamedTuple

import torch
from torch import Tensor

from fxshap.rules.elementwise import mean_decay
from fxshap.rules.operation import Operation, keep
from fxshap.rules.reductions import reduced_dims, restore_dims
from fxshap.rules.table import Tensors, rule

aten = torch.ops.aten


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


def logsumexp_multiplier(r: Tensor, x: Tensor, end_r: Row, end_x: Row) -> Tensor:
    """(dL / dS) (de_j / da_j) at every logit."""
    change = change_of_logsumexp(end_r, end_x)
    # e = y S, and S is 1 at the end with the larger L.
    s_r, s_x = (-change).clamp_(max=0).exp_(), change.clamp(max=0).exp_()
    slope = mean_decay(torch.zeros_like(change), change).reciprocal_()
    return mean_decay(r, x).mul_(torch.maximum(end_r.y * s_r, end_x.y * s_x)).mul_(slope)


def ends_of(
    operation: Operation, reference: Tensors, sample: Tensors, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Row, Row, list[int]]:
    """Return both ends in the dtype of the output, their rows, and the dimensions of a row."""
    (r,), (x,) = reference, sample
    dims = reduced_dims(operation, r)

    def kept(value: Tensor) -> Row:
        return keep(value, f"row {dims} {dtype}", lambda a: row_of(a.to(dtype), dims))

    return r.to(dtype), x.to(dtype), kept(r), kept(x), dims


@rule(aten.logsumexp, aten.special_logsumexp)
def logsumexp(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """Log of the sum of exponentials over one or more dimensions."""
    r, x, end_r, end_x, dims = ends_of(operation, reference, sample, grad.dtype)
    grad = restore_dims(operation, grad, dims)
    return (logsumexp_multiplier(r, x, end_r, end_x).mul_(grad),)


@rule(aten.log_softmax, aten._log_softmax, aten.special_log_softmax)
def log_softmax(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """a - logsumexp(a)."""
    r, x, end_r, end_x, dims = ends_of(operation, reference, sample, grad.dtype)
    total = grad.sum(dims, keepdim=True)
    out = grad - logsumexp_multiplier(r, x, end_r, end_x).mul_(total)
    return (out.to(reference[0].dtype),)


@rule(aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax)
def softmax(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """exp(a - logsumexp(a))."""
    r, x, end_r, end_x, dims = ends_of(operation, reference, sample, grad.dtype)
    change = change_of_logsumexp(end_r, end_x)
    # u_x - u_r = (x - r) - (L_x - L_r)
    weighted = mean_decay(r + change, x).mul_(torch.maximum(end_r.y, end_x.y)).mul_(grad)
    total = weighted.sum(dims, keepdim=True)
    out = weighted.sub_(logsumexp_multiplier(r, x, end_r, end_x).mul_(total))
    return (out.to(reference[0].dtype),)
