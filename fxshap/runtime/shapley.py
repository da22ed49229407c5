"""The exact Shapley values of sample-reference pairs, from the outputs of all coalitions.

The value of a coalition is the output at the hybrid that takes the features of the coalition from
the sample and all others from the reference (Shapley 1953; Lundberg and Lee 2017, eq. 4, where the
reference replaces the absent features). One evaluation serves all features and all outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import factorial

import torch
from torch import Tensor

from fxshap.runtime.features import spread_features

#: Returns the outputs, of shape (rows, outputs), for rows of all inputs.
Function = Callable[[list[Tensor]], Tensor]


def coalitions(players: int, start: int = 0, stop: int | None = None) -> Tensor:
    """Return the subsets of the players, or some of them.

    Parameters
    ----------
    players : int
        The number of players.
    start, stop : int, optional
        The numbers of the first subset and of the one after the last; by default all 2 ** players.

    Returns
    -------
    Tensor
        Booleans of shape (subsets, players). Subset k contains player j if bit j of k is set.
    """
    numbers = torch.arange(start, 2**players if stop is None else stop).unsqueeze(1)
    return (numbers >> torch.arange(players)) % 2 == 1


def shapley_weights(members: Tensor) -> Tensor:
    """Return the matrix that maps the values of coalitions to the Shapley values.

    A player's Shapley value is its marginal contribution to the players before it, averaged over
    all orders. A coalition S that contains the player has the weight (|S| - 1)! (n - |S|)! / n!,
    and one that does not contain it has the weight -|S|! (n - |S| - 1)! / n!. The values of all
    coalitions are needed; their products with the weights can be summed in parts.

    Parameters
    ----------
    members : Tensor
        Booleans of shape (coalitions, players), as :func:`coalitions` returns them.

    Returns
    -------
    Tensor
        Float64 weights of shape (players, coalitions).
    """
    players = members.shape[1]
    orders = factorial(players)
    with_player = [0.0] + [
        factorial(size - 1) * factorial(players - size) / orders for size in range(1, players + 1)
    ]
    without_player = [-weight for weight in with_player[1:]] + [0.0]
    sizes = members.sum(dim=1)
    weights_with = torch.tensor(with_player, dtype=torch.float64)[sizes]
    weights_without = torch.tensor(without_player, dtype=torch.float64)[sizes]
    return torch.where(members.T, weights_with, weights_without)


def shapley_values_of_pairs(
    function: Function,
    samples: Sequence[Tensor],
    references: Sequence[Tensor],
    numbers: Sequence[Tensor],
    players: Tensor,
    batch_size: int,
    step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the exact Shapley values of every pair of a sample and a reference.

    Pairs with as many players have the same coalitions, so they are evaluated together.

    Parameters
    ----------
    function : callable
        Maps a list of inputs, of shape (rows, ...), to outputs of shape (rows, outputs).
    samples : sequence of Tensor
        One tensor per explained input, of shape (pairs or 1, ...).
    references : sequence of Tensor
        One tensor per input, of shape (pairs, ...); those after the explained ones are the same
        for sample and reference.
    numbers : sequence of Tensor
        The features, from :func:`fxshap.runtime.features.feature_numbers`.
    players : Tensor
        Booleans of shape (pairs, features): which features take part. The others stay those of the
        reference, and have the value 0.
    batch_size : int
        The largest number of rows in one call of `function`.
    step : callable
        Called before every call of `function`.

    Returns
    -------
    Tensor
        Float64 values of shape (pairs, features, outputs), on the CPU.
    """
    values = torch.zeros(0)
    for pairs, ids, start, stop in batches_of_coalitions(players, batch_size):
        step()
        members = coalitions(ids.shape[1], start, stop)
        present = members.unsqueeze(1)
        if ids.shape[1] < players.shape[1]:
            every = torch.zeros(len(members), len(pairs), players.shape[1], dtype=torch.bool)
            present = every.scatter_(
                2, ids.expand(len(members), *ids.shape), present.expand(-1, *ids.shape)
            )
        points = hybrids(present, pairs, samples, references, numbers)
        worth = function(points).cpu().double().unflatten(0, (len(members), len(pairs)))
        if not len(values):
            values = torch.zeros(*players.shape, worth.shape[-1], dtype=torch.float64)
        gains = torch.einsum("nc,cpk->pnk", shapley_weights(members), worth)
        values[pairs.unsqueeze(1), ids] += gains
    return values


def batches_of_coalitions(
    players: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Yield some pairs, the features that play in each, and the first and last of some coalitions.

    Parameters
    ----------
    players : Tensor
        Booleans of shape (pairs, features).
    batch_size : int
        The largest number of coalitions of all pairs in one batch.
    """
    counts = players.sum(1)
    for count in counts.unique().tolist():
        total = 2**count
        size = min(total, batch_size)
        for pairs in (counts == count).nonzero().flatten().split(batch_size // size):
            ids = players[pairs].nonzero()[:, 1].reshape(len(pairs), count)
            for start in range(0, total, size):
                yield pairs, ids, start, min(start + size, total)


def count_batches(players: Tensor, batch_size: int) -> int:
    """Return how many batches :func:`batches_of_coalitions` yields."""
    counts, pairs = players.sum(1).unique(return_counts=True)
    sizes = [(2**n, min(2**n, batch_size)) for n in counts.tolist()]
    return sum(
        -(-total // size) * -(-many // (batch_size // size))
        for (total, size), many in zip(sizes, pairs.tolist(), strict=True)
    )


def hybrids(
    present: Tensor,
    pairs: Tensor,
    samples: Sequence[Tensor],
    references: Sequence[Tensor],
    numbers: Sequence[Tensor],
) -> list[Tensor]:
    """Return the inputs at every coalition of every pair, of shape (coalitions * pairs, ...).

    Parameters
    ----------
    present : Tensor
        Booleans of shape (coalitions, pairs or 1, features): what comes from the sample.
    pairs : Tensor
        The numbers of the pairs.
    samples, references, numbers
        As :func:`shapley_values_of_pairs` takes them.
    """
    rows = pairs.to(references[0].device)
    chosen = [r[rows] for r in references]
    explained = [
        torch.where(spread_features(present, number).to(r.device), x if len(x) == 1 else x[rows], r)
        for x, r, number in zip(samples, chosen, numbers, strict=False)
    ]
    bound = [r.expand(len(present), *r.shape) for r in chosen[len(samples) :]]
    return [x.flatten(0, 1) for x in (*explained, *bound)]
