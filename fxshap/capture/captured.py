"""The result of a capture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxshap.capture.guards import Guards
from fxshap.capture.readings import Reading


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
    guards : Guards
        What Python has read from weights and bound arguments. The graph holds while they do.
    readings : tuple of Reading
        What Python has read from tensors that depend on the explained inputs.
    decisions : dict of str to list
        For each of the user's lines whose other branch raises, what it has read. The graph is that
        of inputs for which it reads the same.
    numbers : tuple of str
        The user's lines that take numbers out of tensors that depend on the explained inputs, and
        compute the same with the other numbers that were tried.
    """

    module: fx.GraphModule
    weights: dict[str, str]
    rows: int | None
    explained: int
    guards: Guards
    readings: tuple[Reading, ...] = ()
    decisions: Mapping[str, list[Any]] = field(default_factory=dict)
    numbers: tuple[str, ...] = ()
    assumed: bool = False
