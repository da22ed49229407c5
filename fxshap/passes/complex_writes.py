"""Write into complex tensors by their real and imaginary parts.

``z[..., :k] = f`` is a ``slice_scatter`` in a functional graph, to which autograd gives no
derivative for complex numbers. As a write into the real tensor ``view_as_real(z)`` it has one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import arguments_by_name, call_nodes, op_packet
from fxshap.passes.context import Context

aten = torch.ops.aten

#: For each write, the names of its arguments that are dimensions.
WRITES: dict[Any, tuple[str, ...]] = {
    aten.slice_scatter: ("dim",),
    aten.select_scatter: ("dim",),
    aten.diagonal_scatter: ("dim1", "dim2"),
}


def split_complex_writes(graph: fx.Graph, context: Context) -> fx.Graph:
    """Replace every write into a complex tensor by one into its real and imaginary parts."""
    for node in call_nodes(graph):
        dims = WRITES.get(op_packet(node))
        if dims is None or not node.meta["val"].is_complex():
            continue
        target: Any = node.target
        options = arguments_by_name(node)
        base, source = options.pop("self"), options.pop("src")
        for dim in dims:
            options[dim] %= base.meta["val"].dim()  # the parts are one more dimension, the last
        with graph.inserting_before(node):
            parts = [
                insert_call(graph, node, aten.view_as_real.default, (z,)) for z in (base, source)
            ]
            if op_packet(node) is aten.diagonal_scatter:  # whose diagonal is the last dimension
                parts[1] = insert_call(graph, node, aten.transpose.int, (parts[1], -1, -2))
            written = insert_call(graph, node, target, (*parts, *options.values()))
            result = insert_call(graph, node, aten.view_as_complex.default, (written,))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return graph
