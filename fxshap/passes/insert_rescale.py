"""The pass that replaces every nonlinear node by `rescale`, and taps its inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from fxshap.autograd.rescale import RESCALES, rescale, rescale_activation
from fxshap.graph.nodes import (
    aten,
    batch_dims,
    call_nodes,
    has_floating_output,
    varying_arguments,
    varying_slots,
)
from fxshap.graph.provenance import describe_location
from fxshap.ops.frozen import CONVOLUTIONS, frozen_batch_norm, frozen_convolution
from fxshap.ops.library import BATCH_NORM
from fxshap.rules.core.registry import find_rule


def original_operator(node: fx.Node) -> Any:
    """Return the operator that a node of the rewritten graphs is, or stands for."""
    if node.target is rescale:
        return node.args[4]
    if node.target is rescale_activation:
        return node.args[6]
    if node.target is frozen_batch_norm:
        return aten.batch_norm.default
    if node.target is frozen_convolution:
        return next(op for op, dims in CONVOLUTIONS.items() if dims == node.args[0])
    return node.target


def is_rescaled(node: fx.Node) -> bool:
    """Say whether a node of the rewritten graph has a multiplier for a derivative."""
    return node.target is rescale or node.target in RESCALES.values()


def needs_rule(node: fx.Node) -> bool:
    """Say whether a node is nonlinear in what depends on the input, and has a gradient to give."""
    if not node.meta["varying"] or node.target is operator.getitem or not has_floating_output(node):
        return False
    rule = find_rule(node.target)
    varying = varying_arguments(node)
    # What makes floats of nothing but integers or booleans has no derivative to be linear with.
    jumps = not any(has_floating_output(source) for _, source in varying)
    return jumps or rule is None or not rule.is_linear({place for place, _ in varying})


def insert_rescale(graph: fx.Graph) -> tuple[fx.Graph, tuple[str, ...], tuple[str, ...]]:
    """Copy a graph with every nonlinear node replaced by `rescale`.

    Also return the taps, and apart from them those that are variances.
    """
    attribute = fx.Graph()
    ends = attribute.placeholder("ends")
    copies: dict[fx.Node, fx.Node] = {}
    taps: dict[str, None] = {}
    variances: dict[str, None] = {}
    for node in graph.nodes:
        if node.op == "output":
            attribute.output(copies[node.args[0]])
        elif node.op == "call_function" and needs_rule(node):
            taken: Any = varying_slots(node)
            sources = [source for _, source in varying_arguments(node)]
            for source in sources:
                (variances if source.meta.get("variance") else taps)[source.name] = None
            rows = (*(batch_dims(source)[0] for source in sources), *batch_dims(node))
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            operator = () if node.target in RESCALES else (node.target,)
            args = (ends, describe_location(node), taken, rows, *operator, *args)
            call = RESCALES.get(node.target, rescale)
            copies[node] = add_replacement(node, attribute, call, args, kwargs)
        else:
            copies[node] = attribute.node_copy(node, copies.__getitem__)
    return attribute, tuple(taps), tuple(variances)


def add_replacement(
    node: fx.Node, graph: fx.Graph, target: Callable[..., Any], args: Any, kwargs: Any
) -> fx.Node:
    """Add a call to another graph, with the name and the origin of the node it stands for."""
    call = graph.create_node("call_function", target, args, kwargs, name=node.name)
    call.meta = dict(node.meta)
    return call


def use_frozen_kernels(graph: fx.Graph) -> fx.Graph:
    """Let batch norms, and convolutions with constant weights, keep nothing of what they get."""
    for node in call_nodes(graph):
        if node.target is BATCH_NORM:
            node.target = frozen_batch_norm
        elif node.target in CONVOLUTIONS and [p for p, _ in varying_arguments(node)] == [0]:
            node.args = (CONVOLUTIONS[node.target], *node.args)
            node.target = frozen_convolution
    return graph


def return_taps(graph: fx.Graph, taps: tuple[str, ...]) -> fx.Graph:
    """Copy a graph, returning the output and the tapped values."""
    observe = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = observe.graph_copy(graph, copies)
    named = {node.name: copy for node, copy in copies.items()}
    observe.output((output, tuple(named[tap] for tap in taps)))
    return observe


def generic_operations(attribute: fx.GraphModule) -> list[str]:
    """Return the names of the operations that take the generic rule in a rewritten graph."""
    targets: set[Any] = {
        original_operator(node) for node in call_nodes(attribute.graph) if is_rescaled(node)
    }
    rules = {target: find_rule(target) for target in targets}
    return sorted(str(t) for t, rule in rules.items() if rule is None or not rule.closed)
