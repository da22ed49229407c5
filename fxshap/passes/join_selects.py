"""Selections along one dimension as one operation, whose gradient is one tensor."""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import fx

from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import call_args, call_nodes

aten = torch.ops.aten


def join_selects(graph: fx.Graph) -> fx.Graph:
    """Replace the selections ``x[0], x[1], ...`` along one dimension by ``x.unbind()``.

    The gradient of every selection is as large as `x` and full of zeros, and all of them are added.
    That of ``unbind`` stacks the gradients of its parts. Attention selects its query, key and
    value, and a loop over a sequence selects its steps.
    """
    selects: dict[tuple[fx.Node, int], list[fx.Node]] = defaultdict(list)
    for node in call_nodes(graph):
        if node.target is aten.select.int:
            x, dim, index = call_args(node)
            shape = x.meta["val"].shape
            if isinstance(shape[dim], int) and isinstance(index, int):
                selects[x, dim % len(shape)].append(node)
    for (x, dim), nodes in selects.items():
        size = x.meta["val"].shape[dim]
        indices = {call_args(node)[2] % size for node in nodes}
        if len(indices) < 2 or 2 * len(indices) < size:
            continue
        with graph.inserting_before(nodes[0]):
            parts = insert_call(graph, nodes[0], aten.unbind.int, (x, dim))
        for node in nodes:
            index = call_args(node)[2] % size
            node.meta["op"] = node.target
            node.target, node.args, node.kwargs = operator.getitem, (parts, index), {}
    return graph
