"""The result of a capture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Captured:
    """A model as one functional ATen graph.

    Attributes
    ----------
    module : fx.GraphModule
        Its placeholders are the model's inputs, its ``get_attr`` nodes the model's weights.
    weights : dict of str to str
        For each weight of the graph, its qualified name in the user's model.
    rows : int or None
        The only number of rows that the graph runs on; ``None`` if it runs on any number.
    explained : int
        How many of the placeholders are explained. They come first.
    assumed : bool
        Whether the graph is that of inputs that leave no group empty, where the model asks
        (:mod:`fxshap.capture.groups`).
    """

    module: fx.GraphModule
    weights: dict[str, str]
    rows: int | None
    explained: int
    assumed: bool = False
