"""The result of a capture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    Attributes
    ----------
    module : fx.GraphModule
        Placeholders are the model's inputs, ``get_attr`` nodes its weights.
    weights : dict of str to str
        For each weight of the graph, its qualified name in the user's model.
    rows : int or None
        The only number of rows the graph runs on; ``None`` if any will do.
    explained : int
        How many of the placeholders, the first ones, are explained.
    """

    module: fx.GraphModule
    weights: dict[str, str]
    rows: int | None
    explained: int
