"""Build the rescaled and the tapped graph: every nonlinear node becomes `rescale`, or is tapped.

These functions run after the passes. A node that is linear in what depends on the input stays as it
is, because autograd already gives its exact multipliers.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from fxshap.autograd.rescale import RESCALES, rescale
from fxshap.capture.unlift import is_fixed
from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import (
    batch_dims,
    call_args,
    call_nodes,
    has_floating_output,
    is_floating_node,
    output_tensors,
    varying_arguments,
    varying_slots,
)
from fxshap.graph.provenance import describe_location
from fxshap.ops.frozen import (
    CONVOLUTIONS,
    frozen_batch_norm,
    frozen_convolution,
    frozen_linear,
)
from fxshap.ops.library import BATCH_NORM
from fxshap.rules.core.registry import find_rule
from fxshap.rules.smoothed_activations import mean_shift

aten = torch.ops.aten


#: Functions that are no operators and have no rule: shifts have no multipliers.
UNRESCALED = (operator.getitem, mean_shift)


def original_operator(node: fx.Node) -> Any:
    """Return the operator of the captured graph that a node of the rewritten graphs computes."""
    return node.meta.get("op", node.target)


def is_rescaled(node: fx.Node) -> bool:
    """Return True if the backward pass of a node gives multipliers instead of derivatives."""
    return node.target is rescale or node.target in RESCALES.values()


def needs_rule(node: fx.Node) -> bool:
    """Return True if a node is nonlinear in what depends on the input, and has a gradient."""
    if not node.meta["varying"] or node.target in UNRESCALED or not has_floating_output(node):
        return False
    varying = varying_arguments(node)
    if not any(has_floating_output(source) for _, source in varying):
        return True  # what makes floats of integers or booleans only has no derivative
    rule = find_rule(node.target)
    return rule is None or not rule.is_linear({position for position, _ in varying})


class RescaledGraph(NamedTuple):
    """A graph with `rescale` nodes, and the names of its taps: other values, and variances."""

    graph: fx.Graph
    tap_names: tuple[str, ...]
    variance_tap_names: tuple[str, ...]


def insert_rescale(graph: fx.Graph) -> RescaledGraph:
    """Copy a graph with every nonlinear node replaced by `rescale`."""
    rescaled = fx.Graph()
    endpoints = rescaled.placeholder("endpoints")
    copies: dict[fx.Node, fx.Node] = {}
    taps: dict[str, None] = {}
    variance_taps: dict[str, None] = {}
    for node in graph.nodes:
        if node.op == "output":
            rescaled.output(copies[node.args[0]])
        elif node.op == "call_function" and needs_rule(node):
            for _, source in varying_arguments(node):
                (variance_taps if source.meta.get("variance") else taps)[source.name] = None
            copies[node] = rescaled_node(node, rescaled, endpoints, copies)
        else:
            copies[node] = rescaled.node_copy(node, copies.__getitem__)
    return RescaledGraph(rescaled, tuple(taps), tuple(variance_taps))


def rescaled_node(
    node: fx.Node, graph: fx.Graph, endpoints: fx.Node, copies: dict[fx.Node, fx.Node]
) -> fx.Node:
    """Add the call of `rescale` for a nonlinear node of another graph, with the node's name."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
    target: Any = node.target
    operator_argument = () if target in RESCALES else (target,)
    return insert_call(
        graph,
        node,
        RESCALES.get(target, rescale),
        (
            endpoints,
            describe_location(node),
            varying_slots(node),
            row_dims(node),
            *operator_argument,
            *args,
        ),
        kwargs,
        name=node.name,
        meta={**node.meta, "op": original_operator(node)},
    )


def use_frozen_kernels(graph: fx.Graph) -> fx.Graph:
    """Replace batch norms and frozen convolutions by kernels that save no input for backward."""
    for node in call_nodes(graph):
        if node.target is BATCH_NORM:
            node.meta["op"] = aten.batch_norm.default
            node.target = frozen_batch_norm
        elif has_frozen_kernel(node):
            node.meta["op"] = node.target
            target: Any = node.target
            node.args = (CONVOLUTIONS[target], *node.args)
            node.target = frozen_convolution
    return graph


def use_frozen_linears(graph: fx.Graph) -> fx.Graph:
    """Replace linear layers of float32 with constant weights by their frozen kernel."""
    for node in call_nodes(graph):
        if node.target is aten.linear.default and has_constant_weight(node):
            node.meta["op"] = node.target
            node.target = frozen_linear
    return graph


def has_constant_weight(node: fx.Node) -> bool:
    """Return True for a linear layer of float32 whose input varies, and nothing else."""
    x, weight = (argument.meta["val"] for argument in call_args(node)[:2])
    varying = [position for position, _ in varying_arguments(node)]
    return varying == [0] and weight.dim() == 2 and x.dtype == weight.dtype == torch.float32


def row_dims(node: fx.Node) -> tuple[int | None, ...]:
    """Return the batch dimension of every varying argument and of each output of a node.

    In a graph for a fixed number of rows no dimension tells that it is the batch. There a node has
    rows if all its tensors have as many entries in their first dimension, and otherwise none: a
    loop over the rows may have computed it from one of them.
    """
    sources = [source for _, source in varying_arguments(node)]
    dims = (*(batch_dims(source)[0] for source in sources), *batch_dims(node))
    rows = next(n for n in node.graph.nodes if n.op == "placeholder").meta["val"].shape[:1]
    if not all(map(is_fixed, rows)):
        return dims
    values = [value for each in (*sources, node) for value in output_tensors(each)]
    have_rows = all(
        value.dim() and is_fixed(value.shape[0]) and [int(value.shape[0])] == [*map(int, rows)]
        for value in values
    )
    return dims if have_rows else (None,) * len(dims)


def has_frozen_kernel(node: fx.Node) -> bool:
    """Return True for a convolution of real numbers with constant weights."""
    target: Any = node.target
    if target not in CONVOLUTIONS or not is_floating_node(node):
        return False
    return [position for position, _ in varying_arguments(node)] == [0]


def return_taps(graph: fx.Graph, tap_names: tuple[str, ...]) -> fx.Graph:
    """Copy a graph, returning the output and the tapped values."""
    tapped = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = tapped.graph_copy(graph, copies)
    by_name = {node.name: copy for node, copy in copies.items()}
    tapped.output((output, tuple(by_name[name] for name in tap_names)))
    return tapped


def without_taps(tapped: fx.Graph) -> fx.Graph:
    """Copy a tapped graph, returning the output only."""
    graph = fx.Graph()
    output, _ = cast(tuple[fx.Node, Any], graph.graph_copy(tapped, {}))
    graph.output(output)
    return graph
