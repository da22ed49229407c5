"""Exact Shapley values of a function by evaluating every coalition of features."""

from collections.abc import Callable

import torch
from torch import Tensor

from fxshap.runtime.shapley import shapley_values_of_pairs


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
    players = torch.ones(1, int(groups.max()) + 1, dtype=torch.bool)
    with torch.no_grad():
        values = shapley_values_of_pairs(
            lambda points: function(points[0]),
            [sample.unsqueeze(0)],
            [reference.unsqueeze(0)],
            [groups.unsqueeze(0)],
            players,
            batch_size,
        )
    return values[0]
