"""What a node of a captured or rewritten graph is."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxshap.autograd.rescale import RESCALES, rescale, rescale_activation
from fxshap.capture.export import UNKNOWN_LINE, node_line, user_module
from fxshap.ops.frozen import CONVOLUTIONS, lean_batch_norm, lean_convolution
from fxshap.rules.core.operation import differentiable
from fxshap.rules.core.registry import find_rule

aten = torch.ops.aten

CASTS = (aten._to_copy, aten.to, aten.type_as)


def packet(node: fx.Node) -> Any:
    """Return the operator packet of a node, such as ``aten.relu`` of ``aten.relu.default``."""
    return getattr(node.target, "overloadpacket", node.target)


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    """Iterate over the operations of a graph, which may change under way."""
    return (node for node in list(graph.nodes) if node.op == "call_function")


def stands_for(node: fx.Node) -> Any:
    """Return the operator that a node of the rewritten graphs is, or stands for."""
    if node.target is rescale:
        return node.args[4]
    if node.target is rescale_activation:
        return node.args[6]
    if node.target is lean_batch_norm:
        return aten.batch_norm.default
    if node.target is lean_convolution:
        return next(op for op, dims in CONVOLUTIONS.items() if dims == node.args[0])
    return node.target


def is_rescaled(node: fx.Node) -> bool:
    """Say whether a node of the rewritten graph has a multiplier for a derivative."""
    return node.target is rescale or node.target in RESCALES.values()


def needs_rule(node: fx.Node) -> bool:
    """Say whether a node is nonlinear in what depends on the input, and has a gradient to give."""
    if not node.meta["varying"] or node.target is operator.getitem or not gives_floats(node):
        return False
    rule = find_rule(node.target)
    varying = varying_arguments(node)
    # What makes floats of nothing but integers or booleans has no derivative to be linear with.
    jumps = not any(gives_floats(source) for _, source in varying)
    return jumps or rule is None or not rule.is_linear({place for place, _ in varying})


def whereabouts(node: fx.Node) -> str:
    """Name a node and the user's module and line that it came from, for messages."""
    module, line = user_module(node), node_line(node)
    place = f"{node.name} in {module}" if module else node.name
    return place if line == UNKNOWN_LINE else f"{place}, {line.partition(' (')[0]}"


def gives_floats(node: fx.Node) -> bool:
    """Say whether any output of a node is floating point."""
    return any(map(differentiable, tensors_of(node)))


def tensors_of(node: fx.Node) -> list[Tensor]:
    """Return the tensors among what a node gives."""
    return [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]


def varying_arguments(node: fx.Node) -> list[tuple[int, fx.Node]]:
    """Return (argument position, node) for every argument that depends on the input."""
    found = [(place, n) for place, arg in enumerate(node.args) for n in nodes_in(arg)]
    named = [(key, n) for key, arg in node.kwargs.items() for n in nodes_in(arg)]
    if named:
        target: Any = node.target
        names = [argument.name for argument in target._schema.arguments]
        found += [(names.index(key), n) for key, n in named]
    return [(place, n) for place, n in found if n.meta["varying"]]


def nodes_in(argument: Any) -> list[fx.Node]:
    """Return the nodes in an argument, which may be a list."""
    return [leaf for leaf in pytree.tree_leaves(argument) if isinstance(leaf, fx.Node)]


def varying_places(node: fx.Node) -> dict[int, str]:
    """Return {place among the flattened arguments: tap} of what depends on the input."""
    flat = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return {
        place: leaf.name
        for place, leaf in enumerate(flat)
        if isinstance(leaf, fx.Node) and leaf.meta["varying"]
    }


def batch_dims(node: fx.Node) -> tuple[int, ...]:
    """Return the dimension of each output of a node that grows with the batch; 0 if unknown."""
    return tuple(
        next((d for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)), 0)
        for value in tensors_of(node)
    )
