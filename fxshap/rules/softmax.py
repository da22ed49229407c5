"""Softmax and its family, through logsumexp, never through exp / sum / reciprocal.

With c the larger of the two row maxima, e = exp(a - c), S = sum e and L = logsumexp(a),

    logsumexp    m_j = (dL / dS) (de_j / da_j)
    log_softmax  u = a - L           grad_j = g_j - m_j sum_i g_i
    softmax      l_i = dy_i / du_i   grad_j = l_j g_j - m_j sum_i l_i g_i

where every quotient is a divided difference. All are bounded and invariant to shifts of the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxshap.rules.elementwise import exp_slope
from fxshap.rules.operation import Operation
from fxshap.rules.table import Tensors, rule

aten = torch.ops.aten


def logsumexp_multiplier(r: Tensor, x: Tensor, dims: list[int]) -> Tensor:
    """(dL / dS) (de_j / da_j) at every logit, for rows along `dims`."""
    c = torch.maximum(x.amax(dims, keepdim=True), r.amax(dims, keepdim=True))
    c = torch.where(c == -math.inf, 0.0, c)
    r, x = r - c, x - c
    s_r, s_x = r.exp().sum(dims, keepdim=True), x.exp().sum(dims, keepdim=True)
    lo, hi = torch.minimum(s_r, s_x), torch.maximum(s_r, s_x)
    gap = hi - lo
    # A row far below the other underflows to S = 0: its logarithm comes from its own maximum.
    far = (x.logsumexp(dims, keepdim=True) - r.logsumexp(dims, keepdim=True)).abs()
    change = torch.where(lo > hi / 2, torch.log1p(gap / lo), far)
    # S is at least 1, but 0 where both rows are -inf all through.
    slope = torch.where(gap == 0, hi.clamp(min=1).reciprocal(), change / gap)
    return slope * exp_slope(r, x)


def log_softmax_rows(a: Tensor, dim: int) -> Tensor:
    """a - logsumexp(a), with -inf (not nan) where a whole row is -inf."""
    return a.log_softmax(dim).masked_fill(a == -math.inf, -math.inf)


def dims_of(dim: int | list[int]) -> list[int]:
    """Return `dim` as a list."""
    return [dim] if isinstance(dim, int) else list(dim)


@rule(aten.logsumexp, aten.special_logsumexp)
def logsumexp(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """Log of the sum of exponentials over one or more dimensions."""
    (r,), (x,) = reference, sample
    dims = dims_of(operation["dim"])
    if not operation["keepdim"]:
        for dim in sorted(dim % r.dim() for dim in dims):
            grad = grad.unsqueeze(dim)
    return (grad * logsumexp_multiplier(r, x, dims),)


@rule(aten.log_softmax, aten._log_softmax, aten.special_log_softmax)
def log_softmax(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """a - logsumexp(a)."""
    r, x = reference[0].to(grad.dtype), sample[0].to(grad.dtype)
    dim = operation["dim"]
    out = grad - logsumexp_multiplier(r, x, [dim]) * grad.sum(dim, keepdim=True)
    return (out.to(reference[0].dtype),)


@rule(aten.softmax, aten._softmax, aten._safe_softmax, aten.special_softmax)
def softmax(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """exp(a - logsumexp(a))."""
    r, x = reference[0].to(grad.dtype), sample[0].to(grad.dtype)
    dim = operation["dim"]
    weighted = grad * exp_slope(log_softmax_rows(r, dim), log_softmax_rows(x, dim))
    total = weighted.sum(dim, keepdim=True)
    out = weighted - logsumexp_multiplier(r, x, [dim]) * total
    return (out.to(reference[0].dtype),)
