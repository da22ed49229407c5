"""Passes that give equivalent nodes one form."""

from __future__ import annotations

import torch
from torch import fx

from fxshap.graph.dataflow import IDENTITIES
from fxshap.graph.nodes import call_nodes, op_packet

aten = torch.ops.aten


#: Views need matching strides, and a rule may return others.
RESHAPES = (aten.view, aten._unsafe_view)


def drop_identities(graph: fx.Graph) -> fx.Graph:
    """Remove copies, detachments and assertions, which change nothing in a functional graph."""
    for node in call_nodes(graph):
        if op_packet(node) is aten.copy:  # copy(old, new) is new in the shape and the type of old
            old, new, *_ = node.args
            node.target, node.args = aten.expand_as.default, (new, old)
        if op_packet(node) in IDENTITIES:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif "assert" in str(node.target) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph


def sort_topk(graph: fx.Graph) -> fx.Graph:
    """Ask every top-k for its values in order, which the rules count on, where it is left open."""
    for node in call_nodes(graph):
        if op_packet(node) is aten.topk:
            node.args, node.kwargs = (
                node.args[:4],
                {k: v for k, v in node.kwargs.items() if k != "sorted"},
            )
    return graph


def reshape_views(graph: fx.Graph) -> fx.Graph:
    """Turn ``view`` into ``reshape``."""
    for node in call_nodes(graph):
        if op_packet(node) in RESHAPES and node.target is not aten.view.dtype:
            node.target = aten.reshape.default
    return graph
