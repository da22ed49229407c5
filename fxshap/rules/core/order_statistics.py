"""Sorted endpoints of many elements, and the probabilities of their counts at a random time.

The references and samples of n elements are sorted together into 2n positions. Seen from one of
these, `above` elements are before it at both endpoints, `gained` at the sample only and `lost` at
the reference only. Let every element change from its reference to its sample at a uniformly random
time of [0, 1], which makes every order of the changes equally probable (Owen 1972). Then of p
gained and q lost elements, k are before the position at time t with the probability

    Pr[Bin(p, t) + Bin(q, 1 - t) = k]

and integrals of it over t are the Shapley values (Shapley 1953) of games that count elements.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: The most elements whose endpoints may enclose one position; the tables grow with its cube.
MAX_CROSSINGS = 128


class SortedEndpoints(NamedTuple):
    """Both endpoints of n elements in descending order, as 2n positions of the last dimension.

    Attributes
    ----------
    value : Tensor
        Float64 values in descending order; equal ones in the order of their elements.
    element : Tensor
        The element at each position.
    is_sample : Tensor
        True where a position holds the sample of its element, else it holds the reference.
    position_r, position_x : Tensor
        The positions of the two endpoints of each element, of shape (..., n).
    above, gained, lost : Tensor
        How many elements are at or before each position at both endpoints, at the sample only, and
        at the reference only.
    """

    value: Tensor
    element: Tensor
    is_sample: Tensor
    position_r: Tensor
    position_x: Tensor
    above: Tensor
    gained: Tensor
    lost: Tensor

    @property
    def first(self) -> Tensor:
        """The earlier position of each element."""
        return torch.minimum(self.position_r, self.position_x)

    @property
    def last(self) -> Tensor:
        """The later position of each element."""
        return torch.maximum(self.position_r, self.position_x)

    @property
    def rises(self) -> Tensor:
        """True where the sample of an element is before its reference."""
        return self.position_x < self.position_r


def sort_endpoints(r: Tensor, x: Tensor) -> SortedEndpoints:
    """Sort both endpoints of the elements in the last dimension together."""
    endpoints = torch.stack(torch.broadcast_tensors(r.double(), x.double()), -1).flatten(-2)
    value, order = endpoints.sort(dim=-1, descending=True, stable=True)
    position = order.argsort(-1)
    position_r, position_x = position[..., 0::2], position[..., 1::2]
    is_sample = order % 2 == 1
    last = torch.maximum(position_r, position_x)
    above = torch.zeros_like(order).scatter_(-1, last, 1).cumsum(-1)
    gained = is_sample.cumsum(-1) - above
    lost = (~is_sample).cumsum(-1) - above
    element = order // 2
    return SortedEndpoints(value, element, is_sample, position_r, position_x, above, gained, lost)


def binomial_tables_for(endpoints: SortedEndpoints) -> Tensor | None:
    """Return the :func:`binomial_tables` for some endpoints; ``None`` if they were too large."""
    crossings = int((endpoints.gained + endpoints.lost).max())
    if crossings > MAX_CROSSINGS:
        return None
    return binomial_tables(-(-crossings // 8) * 8).to(endpoints.value.device)


@lru_cache(maxsize=16)
def binomial_tables(size: int) -> Tensor:
    """Integrate Pr[Bin(p, t) + Bin(q, 1 - t) = k] over t, and t times it, for p + q <= `size`.

    Returns
    -------
    Tensor
        Float64, of shape (2, size + 1, size + 1, size + 1) for p, q and k.
    """
    # The integrands are polynomials of degree size + 1 at most, so the quadrature is exact.
    points, weights = np.polynomial.legendre.leggauss(size // 2 + 2)
    t, weight = torch.from_numpy((points + 1) / 2), torch.from_numpy(weights / 2)
    weight = torch.stack([weight, weight * t])
    tables = torch.zeros(2, *[size + 1] * 3, dtype=torch.float64)
    probability = torch.zeros(size + 1, size + 1, len(t), dtype=torch.float64)  # q, k, t for p = 0
    probability[0, 0] = 1.0
    for q in range(size):
        probability[q + 1] = add_trial(probability[q], 1 - t)
    for p in range(size + 1):
        tables[:, p, : len(probability)] = torch.einsum("qkt,wt->wqk", probability, weight)
        probability = add_trial(probability[:-1], t)
    return tables


def add_trial(probability: Tensor, t: Tensor) -> Tensor:
    """Return the distribution of a count after one more trial, which succeeds with probability t.

    The counts are in the last dimension but one.
    """
    added = probability * (1 - t)
    added[..., 1:, :].addcmul_(probability[..., :-1, :], t)
    return added


def lookup(table: Tensor, p: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return ``table[p, q, k]``; 0 where one of them is negative or k is more than p + q."""
    size = len(table)
    possible = (p >= 0) & (q >= 0) & (k >= 0) & (k <= p + q)
    index = ((p * size + q) * size + k).masked_fill_(~possible, 0)
    return table.flatten()[index].masked_fill_(~possible, 0.0)
