"""A pass: of several values that are written to one place, the last one counts.

In ``h[:, index] = values``, ``scatter`` and ``index_copy`` an index may repeat itself. PyTorch then
gives the cotangent of the place to every value, though only one of them is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxshap.graph.insertion import insert_function
from fxshap.graph.nodes import call_nodes, op_packet

aten = torch.ops.aten


def resolve_duplicate_writes(graph: fx.Graph) -> fx.Graph:
    """Write what depends on the input at constant indices as a sum of what stays.

    Indices that depend on the input have forms of their own (:mod:`fxshap.passes.relax_indices`).
    """
    for node in call_nodes(graph):
        form = FORMS.get(op_packet(node))
        found = form(*node.args) if form is not None and not node.kwargs else None
        if found is None:
            continue
        formula, base, indices, values = found
        constant = all(not index.meta["varying"] and is_whole(index) for index in indices)
        if not values.meta["varying"] or not constant:
            continue
        with graph.inserting_before(node):
            whole = insert_function(graph, node, formula, base, values, *indices)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    return graph


def is_whole(index: fx.Node) -> bool:
    """Say whether an index holds whole numbers, not a mask, whose places are all different."""
    return bool(index.meta["val"].dtype != torch.bool)


def stays(places: Tensor, size: int | torch.SymInt) -> Tensor:
    """Say of each of several numbers of places, all below `size`, whether it is the last."""
    order = torch.arange(places.numel(), device=places.device)
    last = order.new_zeros(size).scatter_reduce(0, places.flatten(), order, "amax")
    return last[places] == order.reshape(places.shape)


def numbers(base: Tensor) -> Tensor:
    """Number the places of a tensor."""
    return torch.arange(base.numel(), device=base.device).reshape(base.shape)


Found = tuple[Callable[..., Tensor], fx.Node, Sequence[fx.Node], fx.Node]


def scatter(base: fx.Node, dim: int, index: fx.Node, source: Any, *rest: Any) -> Found | None:
    """torch.scatter."""
    if rest or not isinstance(source, fx.Node):
        return None

    def formula(base: Tensor, values: Tensor, index: Tensor) -> Tensor:
        values = values[tuple(slice(size) for size in index.shape)]
        last = stays(numbers(base).gather(dim, index), base.numel())
        kept = torch.where(last, values, 0.0)
        return base.scatter(dim, index, 0.0).scatter_add(dim, index, kept)

    return formula, base, [index], source


def index_copy(base: fx.Node, dim: int, index: fx.Node, source: fx.Node) -> Found:
    """torch.index_copy."""

    def formula(base: Tensor, values: Tensor, index: Tensor) -> Tensor:
        last = stays(index, base.shape[dim])
        kept = torch.where(last, values.movedim(dim, -1), 0.0).movedim(-1, dim)
        return base.index_fill(dim, index, 0.0).index_add(dim, index, kept)

    return formula, base, [index], source


def index_put(
    base: fx.Node, indices: Sequence[Any], values: fx.Node, adds: bool = False
) -> Found | None:
    """Assignment to ``base[indices]``."""
    if adds:
        return None
    places = [place for place, index in enumerate(indices) if index is not None]

    def formula(base: Tensor, values: Tensor, *given: Tensor) -> Tensor:
        at: list[Tensor | None] = [None] * len(indices)
        for place, index in zip(places, given, strict=True):
            at[place] = index
        zero = torch.zeros((), dtype=base.dtype, device=base.device)
        taken: Tensor = aten.index.Tensor(numbers(base), at)
        kept = torch.where(stays(taken, base.numel()), values, 0.0)
        cleared = aten.index_put(base, at, zero)
        whole: Tensor = aten.index_put(cleared, at, kept, True)
        return whole

    return formula, base, [indices[place] for place in places], values


FORMS: dict[Any, Callable[..., Found | None]] = {
    aten.scatter: scatter,
    aten.index_copy: index_copy,
    aten.index_put: index_put,
    aten._unsafe_index_put: index_put,
}
