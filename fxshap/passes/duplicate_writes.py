"""Write assignments at constant indices so that only the last of several values gets a cotangent.

In ``h[:, index] = values``, ``scatter`` and ``index_copy`` an index may repeat itself, and the last
value stays. The backward pass of PyTorch gives the cotangent of the position to every value that
was written there. As a sum in which all values but the last are 0, an assignment has the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxshap.graph.insertion import insert_function
from fxshap.graph.nodes import call_nodes, op_packet
from fxshap.passes.context import Context

aten = torch.ops.aten


class Assignment(NamedTuple):
    """An assignment at indices, as a function ``formula(base, values, *indices) -> result``."""

    formula: Callable[..., Tensor]
    base: fx.Node
    values: fx.Node
    indices: Sequence[fx.Node]


def resolve_duplicate_writes(graph: fx.Graph, context: Context) -> fx.Graph:
    """Write what depends on the input at constant indices as a sum of the values that stay.

    :mod:`fxshap.passes.relax_indices` has formulas for indices that depend on the input.
    """
    for node in call_nodes(graph):
        read = ASSIGNMENTS.get(op_packet(node))
        assignment = read(*node.args) if read is not None and not node.kwargs else None
        if assignment is None:
            continue
        formula, base, values, indices = assignment
        if not values.meta["varying"] or not all(map(is_constant_index, indices)):
            continue
        if not base.meta["val"].dim():  # one number, which is written once
            continue
        with graph.inserting_before(node):
            result = insert_function(graph, node, formula, base, values, *indices)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return graph


def is_constant_index(index: fx.Node) -> bool:
    """Return True for constant integers. The True positions of a mask are all different."""
    return not index.meta["varying"] and index.meta["val"].dtype != torch.bool


def is_last(positions: Tensor, size: int | torch.SymInt) -> Tensor:
    """Return True for each of several positions below `size` that does not occur again later."""
    order = torch.arange(positions.numel(), device=positions.device)
    last = order.new_zeros(size).scatter_reduce(0, positions.flatten(), order, "amax")
    return last[positions] == order.reshape(positions.shape)


def flat_positions(base: Tensor) -> Tensor:
    """Return the position of every element in the flattened tensor, in the tensor's shape."""
    return torch.arange(base.numel(), device=base.device).reshape(base.shape)


# --- the operations ------------------------------------------------------------------------------


def scatter(base: fx.Node, dim: int, index: fx.Node, source: Any, *rest: Any) -> Assignment | None:
    """torch.scatter."""
    if rest or not isinstance(source, fx.Node):
        return None

    def formula(base: Tensor, values: Tensor, index: Tensor) -> Tensor:
        values = values[tuple(slice(size) for size in index.shape)]
        last = is_last(flat_positions(base).gather(dim, index), base.numel())
        staying = torch.where(last, values, 0.0)
        return base.scatter(dim, index, 0.0).scatter_add(dim, index, staying)

    return Assignment(formula, base, source, [index])


def index_copy(base: fx.Node, dim: int, index: fx.Node, source: fx.Node) -> Assignment:
    """torch.index_copy."""

    def formula(base: Tensor, values: Tensor, index: Tensor) -> Tensor:
        last = is_last(index, base.shape[dim])
        staying = torch.where(last, values.movedim(dim, -1), 0.0).movedim(-1, dim)
        return base.index_fill(dim, index, 0.0).index_add(dim, index, staying)

    return Assignment(formula, base, source, [index])


def index_put(
    base: fx.Node, indices: Sequence[Any], values: fx.Node, accumulate: bool = False
) -> Assignment | None:
    """Assignment to ``base[indices]``."""
    if accumulate:
        return None
    dims = [dim for dim, index in enumerate(indices) if index is not None]

    def formula(base: Tensor, values: Tensor, *given: Tensor) -> Tensor:
        at: list[Tensor | None] = [None] * len(indices)
        for dim, index in zip(dims, given, strict=True):
            at[dim] = index
        zero = torch.zeros((), dtype=base.dtype, device=base.device)
        positions: Tensor = aten.index.Tensor(flat_positions(base), at)
        staying = torch.where(is_last(positions, base.numel()), values, 0.0)
        cleared = aten.index_put(base, at, zero)
        result: Tensor = aten.index_put(cleared, at, staying, True)
        return result

    return Assignment(formula, base, values, [indices[dim] for dim in dims])


#: For each operation, a function of its arguments that returns the assignment.
ASSIGNMENTS: dict[Any, Callable[..., Assignment | None]] = {
    aten.scatter: scatter,
    aten.index_copy: index_copy,
    aten.index_put: index_put,
    aten._unsafe_index_put: index_put,
}
