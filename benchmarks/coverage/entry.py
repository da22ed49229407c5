"""One network of a zoo: its name and how to build it for the measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A network with random weights.

    Parameters
    ----------
    zoo, family, name : str
        The collection it comes from, its architecture family in it, and its own name.
    build : callable
        Makes the network; called under a fixed seed.
    shapes : tuple of tuple of int
        The shape of one sample of each input.
    output : callable
        Picks a tensor of shape (rows, ...) from what the network returns.
    package : str
        The distribution that the network comes from, if not this repository.
    """

    zoo: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    output: Callable[[object], Tensor]
    package: str = ""


def only_tensor(result: object) -> Tensor:
    """Return the one tensor a network gives, or the first of several."""
    if isinstance(result, tuple | list):
        return only_tensor(result[0])
    assert isinstance(result, Tensor)
    return result
