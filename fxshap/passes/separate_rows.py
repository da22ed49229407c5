"""Compute from each row what a model computes from all, where it does not matter.

    return (h - h.max()).softmax(-1)            return (h - h.amax(1, keepdim=True)).softmax(-1)

Both return the same, because softmax does not change when a number is subtracted from a row. But
the largest element of all rows is in one of them, to which attributions of all others would flow.
Whether the rows really do not influence each other is checked on the captured graph, by values
(:func:`fxshap.runtime.batching.probe_layout`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import is_floating_node, row_sizes, size_key
from fxshap.passes.context import Context

aten = torch.ops.aten

#: Reductions of all elements to one, and the same over some dimensions.
REDUCTIONS: dict[Any, Any] = {
    aten.max.default: aten.amax.default,
    aten.min.default: aten.amin.default,
    aten.amax.default: aten.amax.default,
    aten.amin.default: aten.amin.default,
    aten.mean.default: aten.mean.dim,
}
#: What may use the one number: operations of two tensors that broadcast, and copies.
ELEMENTWISE = (aten.sub.Tensor, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor)
COPIES = (aten.alias.default, aten.detach.default, aten.clone.default)


def separate_rows(graph: fx.Graph, context: Context) -> fx.Graph:
    """Replace extremes and means of all rows by those of each row, in place."""
    for node in list(graph.nodes):
        if not reduces_all_rows(node):
            continue
        users = users_of_copies(node)
        if users and all(takes_rows(user) for user in users):
            separate(node)
            context.separated = True
    return graph


def reduces_all_rows(node: fx.Node) -> bool:
    """Return True if a node reduces all elements of a varying tensor that has a row per sample."""
    if node.target not in REDUCTIONS or len(node.args) != 1 or node.kwargs:
        return False
    (x,) = node.all_input_nodes
    return bool(node.meta["varying"]) and is_floating_node(x) and has_rows(x)


def has_rows(node: fx.Node) -> bool:
    """Return True if the first dimension of a node counts the rows of the inputs, and no other.

    A dimension of rows times tokens does not: then it might matter that tokens share an extreme.
    """
    shape = node.meta["val"].shape
    grows = [isinstance(size, torch.SymInt) for size in shape]
    if not grows or not grows[0] or any(grows[1:]):
        return False
    return size_key(shape[0]) in row_sizes(node.graph)


def users_of_copies(node: fx.Node) -> list[fx.Node]:
    """Return what uses a node or a copy of it, but no copies."""
    return [
        other
        for user in node.users
        for other in (users_of_copies(user) if user.target in COPIES else [user])
    ]


def takes_rows(user: fx.Node) -> bool:
    """Return True if a node combines a number with each element of a tensor of rows."""
    if user.target not in ELEMENTWISE:
        return False
    rows = tensors_of(user)
    return len(rows) == 1 and has_rows(rows[0])


def tensors_of(user: fx.Node) -> list[fx.Node]:
    """Return those inputs of a node that are tensors with a dimension."""
    return [source for source in user.all_input_nodes if dimensions_of(source)]


def dimensions_of(node: fx.Node) -> int:
    """Return how many dimensions a node has: 0 if it is a number."""
    value = node.meta["val"]
    return value.dim() if isinstance(value, Tensor) else 0


def separate(node: fx.Node) -> None:
    """Replace a reduction of all elements by that of each row, wherever it is used."""
    graph, (x,) = node.graph, node.all_input_nodes
    dims = list(range(1, dimensions_of(x)))
    with graph.inserting_before(node):
        each = insert_call(graph, node, REDUCTIONS[node.target], (x, dims, True)) if dims else x
    replace_in_users(node, each)


def replace_in_users(node: fx.Node, each: fx.Node) -> None:
    """Use the numbers of each row in place of one number, and of its copies; remove these."""
    graph = node.graph
    for user in list(node.users):
        if user.target in COPIES:
            replace_in_users(user, each)
            continue
        (rows,) = tensors_of(user)
        shape = [-1] + [1] * (dimensions_of(rows) - 1)
        with graph.inserting_before(user):
            shaped = insert_call(graph, node, aten.reshape.default, (each, shape))
        user.replace_input_with(node, shaped)
    graph.erase_node(node)
