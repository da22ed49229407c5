"""Which nodes of a graph depend on the values of which others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxshap.graph.nodes import op_packet

aten = torch.ops.aten


#: Operations that read only the shapes of their arguments.
SHAPE_ONLY = frozenset((
    aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.zero, aten.new_zeros,
    aten.new_ones, aten.new_full, aten.new_empty, aten.sym_size, aten.sym_numel, aten.size,
))  # fmt: skip


#: Operations that read only the shape, or the type, of their second argument.
SECOND_BY_SHAPE = frozenset((aten.expand_as, aten.view_as, aten.reshape_as, aten.type_as))


def value_sources(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of which a node reads the values, and not only the shapes."""
    packet = op_packet(node)
    if packet in SHAPE_ONLY:
        return []
    return node.all_input_nodes[: 1 if packet in SECOND_BY_SHAPE else None]


def explained_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Return the inputs that differ between sample and reference."""
    return [n for n in graph.nodes if n.op == "placeholder" and not n.meta.get("bound")]


def mark_varying(graph: fx.Graph) -> fx.Graph:
    """Set ``meta["varying"]`` of every node: True if its value depends on the input's values."""
    varying = value_dependents(graph, explained_inputs(graph))
    for node in graph.nodes:
        node.meta["varying"] = node in varying
    return graph


def varying_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that :func:`mark_varying` marked True, in the order of the graph."""
    return [node for node in graph.nodes if node.meta["varying"]]


def value_dependents(graph: fx.Graph, roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes whose values depend on the values of `roots`, these included."""
    dependents = set(roots)
    for node in graph.nodes:
        if not dependents.isdisjoint(value_sources(node)):
            dependents.add(node)
    return dependents


def subgraph(graph: fx.Graph, result: Any) -> fx.Graph:
    """Return a copy of what a functional graph needs for some of its nodes.

    Parameters
    ----------
    graph : fx.Graph
        Not changed. The copy has all its inputs.
    result : node or nested nodes
        What the copy returns.
    """
    needed = {leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, fx.Node)}
    for node in reversed(graph.nodes):
        if node in needed and node.op != "output":
            needed.update(node.all_input_nodes)
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or (node in needed and node.op != "output"):
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(fx.map_arg(result, copies.__getitem__))
    return part


#: Operations that change nothing in a functional graph.
IDENTITIES = (aten.clone, aten.alias, aten.detach, aten.lift_fresh_copy, aten.contiguous)


def skip_identities(node: fx.Node) -> fx.Node:
    """Return the node that a chain of copies starts from."""
    while op_packet(node) in IDENTITIES:
        (node,) = node.all_input_nodes
    return node
