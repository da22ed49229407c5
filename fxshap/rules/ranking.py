"""Rules of ranks: the exact Shapley values of which element is the k-th largest.

Indices that depend on the input, such as those of argmax, top-k and sort, are written as one-hot
vectors over the candidates (:mod:`fxshap.passes.relax_indices`): ``ranks(s)[j, e] = 1`` if element
e of the scores s has rank j. The players are the elements, each of which changes from its position
at the reference to its position at the sample (:mod:`.order_statistics`). Seen from a position of
element e, `a` of the others are before it at both endpoints, `p` at the sample only and `q` at the
reference only. With P(p, q, k) the integral of Pr[Bin(p, t) + Bin(q, 1 - t) = k] over t, the
Shapley values of ranks(s)[j, e] are

    for e itself:       P(p_x, q_x, j - a_x) - P(p_r, q_r, j - a_r)
    for each of the p:  the integral of w(t) (Pr[p - 1, q; j - 1 - a] - Pr[p - 1, q; j - a])
    for each of the q:  the integral of w(t) (Pr[p, q - 1; j - a] - Pr[p, q - 1; j - 1 - a])

summed over the two positions of e, with the probability w that e is there: t at its sample's,
1 - t at its reference's (Shapley 1953, Owen 1972). They are bounded; a multiplier is such a value
over the difference of its element.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxshap.rules.core.correction import restore
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.order_statistics import (
    SortedEndpoints,
    binomial_tables_for,
    lookup,
    sort_endpoints,
)
from fxshap.rules.core.registry import Tensors, rule

#: Orders of ``fxshap::ranks`` in which rank 0 is the largest.
LARGEST_FIRST = ("argmax", "max", "topk", "descending")


@rule(torch.ops.fxshap.ranks)
def ranking(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """Exact Shapley values of which element has which rank."""
    (r,), (x,) = reference, sample
    sign = 1 if operation["order"] in LARGEST_FIRST else -1
    x = x.expand_as(r)
    d = torch.where(x == r, 0.0, x.double() - r.double())
    values = rank_shapley_values(sign * r, sign * x, grad.double(), operation["lowest"])
    # Between neighbouring numbers a multiplier may overflow the dtype: others carry the rest.
    steepest = torch.finfo(r.dtype).max / r.shape[-1]
    multiplier = torch.where(d == 0, 0.0, values / d).clamp(-steepest, steepest)
    # Torch breaks ties in other ways than `sort_endpoints` does.
    change = one_hot_change(operation, r, x)
    total = (grad.double() * change).flatten(-2).sum(-1)
    n = r.shape[-1]
    restored = restore(multiplier.reshape(-1, n), d.reshape(-1, n), total.reshape(-1, 1))
    return (restored.reshape(r.shape).to(r.dtype),)


@rule(torch.ops.fxshap.one_hot_position)
def one_hot_position(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """Secant of the one-hot vector of an integer."""
    (r,), (x,) = reference, sample
    change = (grad * one_hot_change(operation, r, x)).sum(-1)
    return (torch.where(x == r, 0.0, change / (x - r)),)


def one_hot_change(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Return the change of the one-hot vectors that an operation returns."""
    before, after = operation(r), operation(x)
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    return after - before


def rank_shapley_values(r: Tensor, x: Tensor, grad: Tensor, lowest: int = 0) -> Tensor:
    """Return the Shapley values of the elements in ``<grad, ranks(x) - ranks(r)>``, largest first.

    Parameters
    ----------
    r, x : Tensor
        Reference and sample, of shape (..., n).
    grad : Tensor
        Float64 cotangents of the one-hot ranks from `lowest` on, of shape (..., count, n).

    Returns
    -------
    Tensor
        Of shape (..., n); zeros where too many elements change their order.
    """
    endpoints = sort_endpoints(r, x)
    tables = binomial_tables_for(endpoints)
    if tables is None:
        return torch.zeros_like(r, dtype=torch.float64)
    a, p, q = counts_of_others(endpoints)
    ranks = lowest + torch.arange(grad.shape[-2], device=r.device) - a.unsqueeze(-1)
    p, q = p.unsqueeze(-1), q.unsqueeze(-1)
    element = endpoints.element.unsqueeze(-1).expand(*endpoints.element.shape, grad.shape[-2])
    weight = grad.transpose(-1, -2).gather(-2, element)  # by position, of shape (..., 2n, count)

    def worth(p: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at_sample = lookup(tables[1], p, q, k)
        at_reference = lookup(tables[0], p, q, k) - at_sample
        return torch.where(endpoints.is_sample.unsqueeze(-1), at_sample, at_reference)

    own = (weight * lookup(tables[0], p, q, ranks)).sum(-1)
    gain = (weight * (worth(p - 1, q, ranks - 1) - worth(p - 1, q, ranks))).sum(-1)
    loss = (weight * (worth(p, q - 1, ranks) - worth(p, q - 1, ranks - 1))).sum(-1)
    of_itself = own.gather(-1, endpoints.position_x) - own.gather(-1, endpoints.position_r)
    of_others = torch.where(
        endpoints.rises, sum_between(endpoints, gain), sum_between(endpoints, loss)
    )
    return of_itself + of_others


def counts_of_others(endpoints: SortedEndpoints) -> tuple[Tensor, Tensor, Tensor]:
    """Return `above`, `gained` and `lost` at each position without the element that is there."""
    second = torch.zeros_like(endpoints.above).scatter(-1, endpoints.last, 1)
    first_of_sample = (1 - second) * endpoints.is_sample
    first_of_reference = (1 - second) * ~endpoints.is_sample
    return (
        endpoints.above - second,
        endpoints.gained - first_of_sample,
        endpoints.lost - first_of_reference,
    )


def sum_between(endpoints: SortedEndpoints, worth: Tensor) -> Tensor:
    """Sum over the positions strictly between the two endpoints of every element."""
    total = pad(worth.cumsum(-1), (1, 0))  # before each position
    return total.gather(-1, endpoints.last) - total.gather(-1, endpoints.first + 1)
