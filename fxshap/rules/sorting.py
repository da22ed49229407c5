"""Rules of sorting: the exact Shapley values of order statistics.

The k-th largest of n elements, counted from 0, exceeds a level if more than k elements do, and its
value is the sum of the levels that it exceeds. Take the interval of values between two neighbouring
positions of the sorted endpoints (:mod:`.order_statistics`), which a elements exceed at both
endpoints, p at the sample only and q at the reference only. Changing one of the p matters if k of
the others exceed the interval, and so does changing one of the q. The interval is therefore worth

    +P(p - 1, q, k - a) to each of the p,      -P(p, q - 1, k - a) to each of the q

with P(p, q, k) the integral of Pr[Bin(p, t) + Bin(q, 1 - t) = k] dt. The multiplier of an element
is the mean worth of the intervals between its two endpoints. It lies in [0, 1]; for k = 0 it is
that of :mod:`.maximum`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.order_statistics import (
    SortedEndpoints,
    binomial_tables_for,
    lookup,
    sort_endpoints,
)
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.core.shapes import restore_dims
from fxshap.rules.maximum import values_grad

aten = torch.ops.aten


def order_multiplier(r: Tensor, x: Tensor, grad: Tensor, lowest: int = 0) -> Tensor | None:
    """Return the multipliers of sorting the last dimension in descending order.

    Parameters
    ----------
    r, x : Tensor
        Reference and sample, of shape (..., n).
    grad : Tensor
        Cotangents of the values of rank `lowest`, `lowest` + 1, ..., of shape (..., k).
    lowest : int
        The first of these ranks; the largest value has rank 0.

    Returns
    -------
    Tensor or None
        Of shape (..., n); ``None`` where too many elements change their order.
    """
    endpoints = sort_endpoints(r, x)
    tables = binomial_tables_for(endpoints)
    if tables is None:
        return None
    rank = lowest + torch.arange(grad.shape[-1], device=r.device) - endpoints.above.unsqueeze(-1)
    p, q = endpoints.gained.unsqueeze(-1), endpoints.lost.unsqueeze(-1)
    weight = grad.double().unsqueeze(-2)
    gain = (lookup(tables[0], p - 1, q, rank) * weight).sum(-1)
    loss = (lookup(tables[0], p, q - 1, rank) * weight).sum(-1)
    rising, falling = mean_between(endpoints, gain), mean_between(endpoints, loss)
    return torch.where(endpoints.rises, rising, falling).to(r.dtype)


def mean_between(endpoints: SortedEndpoints, worth: Tensor) -> Tensor:
    """Return the mean worth of the intervals from one endpoint of every element to the other."""
    value, first, last = endpoints.value, endpoints.first, endpoints.last
    height = (value[..., :-1] - value[..., 1:]).nan_to_num(0.0, 0.0)
    total = pad((worth[..., :-1] * height).cumsum(-1), (1, 0))
    total = total.gather(-1, last) - total.gather(-1, first)
    span = value.gather(-1, first) - value.gather(-1, last)
    # The mean over one interval, or none, is its worth itself, which a quotient would round.
    single = (last - first == 1) | (span.nan_to_num(0.0) == 0)
    return torch.where(single, worth.gather(-1, first), total / span)


#: Operations that return several ranks, from the first.
SEVERAL_RANKS = (aten.sort.default, aten.sort.stable, aten.topk.default)


@rule(aten.sort.default, aten.sort.stable, aten.topk, aten.kthvalue, aten.median, aten.nanmedian)
def order(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Any
) -> tuple[Tensor | None, ...]:
    """Values in order, the first k of them, the k-th smallest, or the (lower) median."""
    (r,), (x,) = reference, sample
    values_cotangent, dim = values_grad(grad), operation.get("dim")
    if dim is None:  # of all elements
        r, x, dim = r.flatten(), x.expand_as(r).flatten(), 0
    several = operation.target in SEVERAL_RANKS
    if not several:
        values_cotangent = restore_dims(operation, values_cotangent, [dim])
    lowest = 0 if several else operation.get("k", (r.shape[dim] + 1) // 2) - 1
    sign = 1 if operation.get("descending", operation.get("largest", False)) else -1
    r, x, g = (value.movedim(dim, -1) for value in (r, x, values_cotangent))
    multiplier = order_multiplier(sign * r, sign * x, g, lowest)
    if multiplier is None:
        return generic(operation, reference, sample, grad)
    return (multiplier.movedim(-1, dim).reshape(reference[0].shape),)
