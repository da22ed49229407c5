"""Who is the k-th largest: the exact Shapley values of ranks.

An index that depends on the input, as those of argmax, top-k and sort do, is written as a one-hot
vector over the candidates (:mod:`fxshap.passes.relax_indices`): ``ranks(s)[j, e] = 1`` if element e
of the scores s has rank j. It is a game of the elements, each of which moves from its place in the
reference to its place in the sample on the line of all ends (:mod:`.levels`). Seen from a place of
element e, of the others `a` are before it at both ends, `p` at the sample only and `q` at the
reference only, and with P(p, q, k) the integral of Pr[Bin(p, t) + Bin(q, 1 - t) = k] over t

    e itself is owed       P(p_x, q_x, j - a_x) - P(p_r, q_r, j - a_r)
    each of the p is owed  the integral of w(t) (Pr[p - 1, q; j - 1 - a] - Pr[p - 1, q; j - a])
    each of the q is owed  the integral of w(t) (Pr[p, q - 1; j - a] - Pr[p, q - 1; j - 1 - a])

summed over the two places of e, with the chance w that e is there: t at its sample's, 1 - t at its
reference's (Shapley 1953, Owen 1972). What is owed is bounded; multipliers are it over differences.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxshap.rules.core.correction import restore
from fxshap.rules.core.operation import Operation
from fxshap.rules.core.order_statistics import SortedEndpoints, chances, sort_endpoints, tables_for
from fxshap.rules.core.registry import Tensors, rule
from fxshap.rules.logic import LIBRARY

LIBRARY.define("ranks(Tensor scores, str order, int lowest, int count) -> Tensor")
LIBRARY.define("places(Tensor number, int size) -> Tensor")

#: The indices of ranks lowest, lowest + 1, ... over the last dimension, by torch's own operations,
#: which break ties in their own ways.
INDICES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "argmax": lambda s, lowest, count: s.argmax(-1, keepdim=True),
    "argmin": lambda s, lowest, count: s.argmin(-1, keepdim=True),
    "max": lambda s, lowest, count: s.max(-1, keepdim=True).indices,
    "min": lambda s, lowest, count: s.min(-1, keepdim=True).indices,
    "topk": lambda s, lowest, count: s.topk(count).indices,
    "least": lambda s, lowest, count: s.topk(count, largest=False).indices,
    "descending": lambda s, lowest, count: s.sort(descending=True, stable=True).indices,
    "ascending": lambda s, lowest, count: s.sort(stable=True).indices,
    "kth": lambda s, lowest, count: s.kthvalue(lowest + 1, keepdim=True).indices,
}
LARGEST_FIRST = ("argmax", "max", "topk", "descending")


def one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Write indices as 0/1 floats over the candidates, a new last dimension."""
    return (index.unsqueeze(-1) == torch.arange(size, device=index.device)).to(dtype)


def ranks(scores: Tensor, order: str, lowest: int, count: int) -> Tensor:
    """Who has the ranks, over the last dimension: scores (..., n) to (..., count, n)."""
    return one_hot(INDICES[order](scores, lowest, count), scores.shape[-1], scores.dtype)


def places(number: Tensor, size: int) -> Tensor:
    """Write a whole number, which counts from the end if negative, as 0/1 floats."""
    return one_hot(number.round().long() % size, size, number.dtype)


LIBRARY.impl("ranks", ranks, "CompositeExplicitAutograd")
LIBRARY.impl("places", places, "CompositeExplicitAutograd")


@rule(torch.ops.fxshap.ranks)
def ranking(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """Exact Shapley values of who has which rank."""
    (r,), (x,) = reference, sample
    sign = 1 if operation["order"] in LARGEST_FIRST else -1
    x = x.expand_as(r)
    d = torch.where(x == r, 0.0, x.double() - r.double())
    owed = rank_shares(sign * r, sign * x, grad.double(), operation["lowest"])
    # A step between neighbouring numbers may be too steep for the dtype: others carry the rest.
    steepest = torch.finfo(r.dtype).max / r.shape[-1]
    multiplier = torch.where(d == 0, 0.0, owed / d).clamp(-steepest, steepest)
    # Torch breaks ties, and the line of places does, in different ways.
    change = difference(operation, r, x)
    total = (grad.double() * change).flatten(-2).sum(-1)
    n = r.shape[-1]
    restored = restore(multiplier.reshape(-1, n), d.reshape(-1, n), total.reshape(-1, 1))
    return (restored.reshape(r.shape).to(r.dtype),)


@rule(torch.ops.fxshap.places)
def placing(
    operation: Operation, reference: Tensors, sample: Tensors, grad: Tensor
) -> tuple[Tensor]:
    """Secant of a whole number's place."""
    (r,), (x,) = reference, sample
    change = (grad * difference(operation, r, x)).sum(-1)
    return (torch.where(x == r, 0.0, change / (x - r)),)


def difference(operation: Operation, r: Tensor, x: Tensor) -> Tensor:
    """Return the change of the one-hot floats."""
    before, after = operation(r), operation(x)
    assert isinstance(before, Tensor) and isinstance(after, Tensor)
    return after - before


def rank_shares(r: Tensor, x: Tensor, grad: Tensor, lowest: int = 0) -> Tensor:
    """Return what every element is owed of ``<grad, ranks(x) - ranks(r)>``, largest first.

    Parameters
    ----------
    r, x : Tensor
        Reference and sample, of shape (..., n).
    grad : Tensor
        Float64 cotangents of the one-hot ranks from `lowest` on, of shape (..., count, n).

    Returns
    -------
    Tensor
        Of shape (..., n); zeros where too many elements change places.
    """
    line = sort_endpoints(r, x)
    tables = tables_for(line)
    if tables is None:
        return torch.zeros_like(r, dtype=torch.float64)
    a, p, q = others(line)
    ranks = lowest + torch.arange(grad.shape[-2], device=r.device) - a.unsqueeze(-1)
    p, q = p.unsqueeze(-1), q.unsqueeze(-1)
    weight = grad.transpose(-1, -2).gather(
        -2, line.element.unsqueeze(-1).expand(*line.element.shape, grad.shape[-2])
    )  # of the element of each place, of shape (..., 2n, count)

    def worth(p: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at_sample = chances(tables[1], p, q, k)
        there = line.is_sample.unsqueeze(-1)
        return torch.where(there, at_sample, chances(tables[0], p, q, k) - at_sample)

    own = (weight * chances(tables[0], p, q, ranks)).sum(-1)
    passed = (weight * (worth(p - 1, q, ranks - 1) - worth(p - 1, q, ranks))).sum(-1)
    left = (weight * (worth(p, q - 1, ranks) - worth(p, q - 1, ranks - 1))).sum(-1)
    itself = own.gather(-1, line.place_x) - own.gather(-1, line.place_r)
    return itself + torch.where(line.rises, inside(line, passed), inside(line, left))


def others(line: SortedEndpoints) -> tuple[Tensor, Tensor, Tensor]:
    """Count at each place the elements before it, without the one whose place it is."""
    second = torch.zeros_like(line.above).scatter(-1, line.last, 1)
    first_of_sample = (1 - second) * line.is_sample
    first_of_reference = (1 - second) * ~line.is_sample
    return line.above - second, line.gained - first_of_sample, line.lost - first_of_reference


def inside(line: SortedEndpoints, worth: Tensor) -> Tensor:
    """Sum over the places strictly between the two ends of every element."""
    total = pad(worth.cumsum(-1), (1, 0))  # before each place
    return total.gather(-1, line.last) - total.gather(-1, line.first + 1)
