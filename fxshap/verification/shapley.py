"""Exact Shapley values by evaluating every coalition of features."""

from collections.abc import Callable
from math import factorial

import torch
from torch import Tensor


def coalitions(players: int) -> Tensor:
    """Return every subset of the players.

    Parameters
    ----------
    players : int
        The number of players.

    Returns
    -------
    Tensor
        Booleans of shape (2 ** players, players). Row k contains player j if bit j of k is set.
    """
    numbers = torch.arange(2**players).unsqueeze(1)
    return (numbers >> torch.arange(players)) % 2 == 1


def shapley_weights(players: int) -> Tensor:
    """Return the matrix that maps the values of all coalitions to the Shapley values.

    A player's Shapley value is its marginal contribution to the players before it, averaged over
    all orders. A coalition S that contains the player has the weight (|S| - 1)! (n - |S|)! / n!,
    and one that does not contain it has the weight -|S|! (n - |S| - 1)! / n!.

    Parameters
    ----------
    players : int
        The number of players, n.

    Returns
    -------
    Tensor
        Float64 weights of shape (players, 2 ** players).
    """
    orders = factorial(players)
    with_player = [0.0] + [
        factorial(size - 1) * factorial(players - size) / orders for size in range(1, players + 1)
    ]
    without_player = [-weight for weight in with_player[1:]] + [0.0]
    members = coalitions(players)
    sizes = members.sum(dim=1)
    weights_with = torch.tensor(with_player, dtype=torch.float64)[sizes]
    weights_without = torch.tensor(without_player, dtype=torch.float64)[sizes]
    return torch.where(members.T, weights_with, weights_without)


def shapley_values(
    function: Callable[[Tensor], Tensor],
    sample: Tensor,
    reference: Tensor,
    groups: Tensor | None = None,
    batch_size: int = 4096,
) -> Tensor:
    """Return the exact Shapley values of a function between two points.

    The players are the features, or groups of features. A coalition's value is the function at the
    hybrid point that takes the coalition's features from the sample and all others from the
    reference (Shapley 1953; Lundberg and Lee 2017, eq. 4, where the reference replaces the absent
    features).

    Parameters
    ----------
    function : callable
        Maps a (batch, features) tensor to a (batch, outputs) tensor, row by row.
    sample, reference : Tensor
        One point each, of shape (features,). Use float64 if the function supports it.
    groups : Tensor, optional
        Integers from 0 of shape (features,): the player that each feature belongs to. By default
        every feature is a player.
    batch_size : int
        The number of hybrid points in one call of `function`, out of 2 ** players.

    Returns
    -------
    Tensor
        The values, float64 of shape (players, outputs). Each column sums to the difference
        between the function at the sample and at the reference.

    Examples
    --------
    >>> import torch
    >>> from fxshap.verification.shapley import shapley_values
    >>> product = lambda x: x.prod(dim=1, keepdim=True)
    >>> x, r = torch.tensor([[2.0, 3.0], [0.0, 1.0]], dtype=torch.float64)
    >>> shapley_values(product, x, r).squeeze(1)
    tensor([4., 2.], dtype=torch.float64)
    """
    groups = torch.arange(sample.numel()) if groups is None else groups
    players = int(groups.max()) + 1
    with torch.no_grad():
        values = [
            function(torch.where(members[:, groups].to(sample.device), sample, reference)).cpu()
            for members in coalitions(players).split(batch_size)
        ]
    return shapley_weights(players) @ torch.cat(values).double()
