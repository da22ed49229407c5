"""Which nodes of a graph depend on the values of which others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxshap.graph.nodes import op_packet

aten = torch.ops.aten


#: Operations that take only the shape of their arguments.
SHAPE_ONLY = (
    aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.new_zeros,
    aten.new_ones, aten.new_full, aten.new_empty, aten.sym_size, aten.sym_numel, aten.size,
)  # fmt: skip


#: Operations that take only the shape, or the type, of their second argument.
SECOND_BY_SHAPE = (aten.expand_as, aten.view_as, aten.reshape_as, aten.type_as)


def value_sources(node: fx.Node) -> list[fx.Node]:
    """Return the nodes on whose values, and not on their shapes alone, that of a node depends."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in SHAPE_ONLY:
        return []
    return node.all_input_nodes[: 1 if packet in SECOND_BY_SHAPE else None]


def explained_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs that differ between sample and reference."""
    return [n for n in graph.nodes if n.op == "placeholder" and not n.meta.get("bound")]


def mark_varying(graph: fx.Graph) -> fx.Graph:
    """Write into ``meta["varying"]`` whether a node's value depends on the values of the input."""
    varying = value_dependents(graph, explained_inputs(graph))
    for node in graph.nodes:
        node.meta["varying"] = node in varying
    return graph


def value_dependents(graph: fx.Graph, roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose values depend on the values of `roots`, these included."""
    found = set(roots)
    for node in graph.nodes:
        if not found.isdisjoint(value_sources(node)):
            found.add(node)
    return found


#: Identities in a functional graph.
IDENTITIES = (aten.clone, aten.alias, aten.detach, aten.lift_fresh_copy, aten.contiguous)


def skip_identities(node: fx.Node) -> fx.Node:
    """Return the node that a copy of it was made from."""
    while op_packet(node) in IDENTITIES:
        (node,) = node.all_input_nodes
    return node
