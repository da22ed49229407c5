"""Sorting: the exact Shapley values of order statistics.

The k-th largest of n elements, counted from 0, is above a level when more than k elements are, and
the sum of the levels that it is above. Take the slice between two neighbouring places of the line
of all ends (:mod:`.levels`), with a elements above it at both ends, p at the sample only and q at
the reference only. Moving one of the p above it matters if k of the others are there, and so does
moving one of the q below it, so that the slice is worth

    +P(p - 1, q, k - a) to each of the p,      -P(p, q - 1, k - a) to each of the q

with P(p, q, k) the integral of Pr[Bin(p, t) + Bin(q, 1 - t) = k] dt. The multiplier of an element
is the mean worth of the slices between its two ends: it lies in [0, 1], and for k = 0 it is that of
:mod:`.maximum`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.order_statistics import SortedEndpoints, chances, sort_endpoints, tables_for
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.maximum import values_grad

aten = torch.ops.aten


def order_multiplier(r: Tensor, x: Tensor, grad: Tensor, lowest: int = 0) -> Tensor | None:
    """Multiply through sorting the last dimension in descending order.

    Parameters
    ----------
    r, x : Tensor
        Reference and sample, of shape (..., n).
    grad : Tensor
        Cotangents of the values of rank `lowest`, `lowest` + 1, ..., of shape (..., k).
    lowest : int
        The first rank of these; the largest value has rank 0.

    Returns
    -------
    Tensor or None
        Of shape (..., n); ``None`` where too many elements change places.
    """
    line = sort_endpoints(r, x)
    tables = tables_for(line)
    if tables is None:
        return None
    rank = lowest + torch.arange(grad.shape[-1], device=r.device) - line.above.unsqueeze(-1)
    p, q = line.gained.unsqueeze(-1), line.lost.unsqueeze(-1)
    weight = grad.double().unsqueeze(-2)
    gain = (chances(tables[0], p - 1, q, rank) * weight).sum(-1)
    loss = (chances(tables[0], p, q - 1, rank) * weight).sum(-1)
    multiplier = torch.where(line.rises, mean_between(line, gain), mean_between(line, loss))
    return multiplier.to(r.dtype)


def mean_between(line: SortedEndpoints, worth: Tensor) -> Tensor:
    """Mean worth of the slices below the places from one end of every element to the other."""
    height = (line.value[..., :-1] - line.value[..., 1:]).nan_to_num(0.0, 0.0)
    total = pad((worth[..., :-1] * height).cumsum(-1), (1, 0))
    total = total.gather(-1, line.last) - total.gather(-1, line.first)
    span = line.value.gather(-1, line.first) - line.value.gather(-1, line.last)
    # The mean over one slice, or none, is its worth itself, which a quotient would round.
    one = (line.last - line.first == 1) | (span.nan_to_num(0.0) == 0)
    return torch.where(one, worth.gather(-1, line.first), total / span)


@rule(aten.sort.default, aten.sort.stable, aten.topk, aten.kthvalue, aten.median, aten.nanmedian)
def order(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Values in order, the first k of them, the k-th smallest, or the (lower) median."""
    (r,), (x,) = reference, sample
    whole, dim = grad, operation.get("dim")
    grad = values_grad(grad)
    if dim is None:  # of all elements
        r, x, dim = r.flatten(), x.expand_as(r).flatten(), 0
    several = operation.target in SEVERAL
    if not several and not operation.get("keepdim"):
        grad = grad.unsqueeze(dim)
    lowest = 0 if several else operation.get("k", (r.shape[dim] + 1) // 2) - 1
    sign = 1 if operation.get("descending", operation.get("largest", False)) else -1
    r, x, grad = (value.movedim(dim, -1) for value in (r, x, grad))
    multiplier = order_multiplier(sign * r, sign * x, grad, lowest)
    if multiplier is None:
        return generic(operation, reference, sample, whole)
    return (multiplier.movedim(-1, dim).reshape(reference[0].shape),)


#: Operations that give several ranks, from the first.
SEVERAL = (aten.sort.default, aten.sort.stable, aten.topk.default)
