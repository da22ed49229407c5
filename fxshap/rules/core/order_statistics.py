"""Who is above whom: the places of sorted elements.

Both ends of n elements are sorted into one line of 2n places. Seen from a place on it, `above`
elements are before it at both ends, `gained` at the sample only and `lost` at the reference only.
Let every element take its sample's value at a uniformly random time t of [0, 1], which gives every
order of the elements the same chance (Owen 1972). Then p gained and q lost elements have

    Pr[Bin(p, t) + Bin(q, 1 - t) = k]

as the chance that k of them are before the place at time t, and integrals of it over t are the
Shapley values (Shapley 1953) of games that count who is above whom.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: How many elements a place may lie between the ends of; the tables grow with its cube.
LARGEST_CROWD = 128


class SortedEndpoints(NamedTuple):
    """Both ends of n elements in one descending line, the last dimension, of 2n places.

    Attributes
    ----------
    value : Tensor
        Float64 values in descending order; equal ones in the order of their elements.
    element : Tensor
        The element of each place.
    is_sample : Tensor
        Whether a place holds the sample of its element, else the reference.
    place_r, place_x : Tensor
        The places of the two ends of each element, of shape (..., n).
    above, gained, lost : Tensor
        How many elements are at or before each place at both ends, at the sample only, and at the
        reference only.
    """

    value: Tensor
    element: Tensor
    is_sample: Tensor
    place_r: Tensor
    place_x: Tensor
    above: Tensor
    gained: Tensor
    lost: Tensor

    @property
    def first(self) -> Tensor:
        """The earlier place of each element."""
        return torch.minimum(self.place_r, self.place_x)

    @property
    def last(self) -> Tensor:
        """The later place of each element."""
        return torch.maximum(self.place_r, self.place_x)

    @property
    def rises(self) -> Tensor:
        """Whether the sample of each element is before its reference."""
        return self.place_x < self.place_r


def sort_endpoints(r: Tensor, x: Tensor) -> SortedEndpoints:
    """Sort both ends of the elements in the last dimension into one line."""
    ends = torch.stack(torch.broadcast_tensors(r.double(), x.double()), -1).flatten(-2)
    value, order = ends.sort(dim=-1, descending=True, stable=True)
    place = order.argsort(-1)
    place_r, place_x = place[..., 0::2], place[..., 1::2]
    is_sample = order % 2 == 1
    above = torch.zeros_like(order).scatter_(-1, torch.maximum(place_r, place_x), 1).cumsum(-1)
    gained = is_sample.cumsum(-1) - above
    lost = (~is_sample).cumsum(-1) - above
    return SortedEndpoints(value, order // 2, is_sample, place_r, place_x, above, gained, lost)


def tables_for(line: SortedEndpoints) -> Tensor | None:
    """Return the :func:`chance_tables` that a line needs; ``None`` if they would be too large."""
    crowd = int((line.gained + line.lost).max())
    if crowd > LARGEST_CROWD:
        return None
    return chance_tables(-(-crowd // 8) * 8).to(line.value.device)


@lru_cache(maxsize=16)
def chance_tables(size: int) -> Tensor:
    """Integrate Pr[Bin(p, t) + Bin(q, 1 - t) = k] over t, and t times it, for p + q <= `size`.

    Returns
    -------
    Tensor
        Float64, of shape (2, size + 1, size + 1, size + 1) for p, q and k.
    """
    # Polynomials of degree size + 1 at most, for which as many points are exact.
    points, weights = np.polynomial.legendre.leggauss(size // 2 + 2)
    t, weight = torch.from_numpy((points + 1) / 2), torch.from_numpy(weights / 2)
    weight = torch.stack([weight, weight * t])
    tables = torch.zeros(2, *[size + 1] * 3, dtype=torch.float64)
    chance = torch.zeros(size + 1, size + 1, len(t), dtype=torch.float64)  # q, k, t, with p = 0
    chance[0, 0] = 1.0
    for q in range(size):
        chance[q + 1] = joined(chance[q], 1 - t)
    for p in range(size + 1):
        tables[:, p, : len(chance)] = torch.einsum("qkt,wt->wqk", chance, weight)
        chance = joined(chance[:-1], t)
    return tables


def joined(chance: Tensor, t: Tensor) -> Tensor:
    """Distribution of a count, over the last dimension but one, with one more who counts at t."""
    more = chance * (1 - t)
    more[..., 1:, :].addcmul_(chance[..., :-1, :], t)
    return more


def chances(table: Tensor, p: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Look up ``table[p, q, k]``; 0 where one of them is negative or k is more than p + q."""
    size = len(table)
    possible = (p >= 0) & (q >= 0) & (k >= 0) & (k <= p + q)
    place = ((p * size + q) * size + k).masked_fill_(~possible, 0)
    return table.flatten()[place].masked_fill_(~possible, 0.0)
