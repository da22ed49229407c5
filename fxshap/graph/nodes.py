"""What a node of a captured or rewritten graph is."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import differentiable

aten = torch.ops.aten

CASTS = (aten._to_copy, aten.to, aten.type_as)


def op_packet(node: fx.Node) -> Any:
    """Return the operator packet of a node, such as ``aten.relu`` of ``aten.relu.default``."""
    return getattr(node.target, "overloadpacket", node.target)


def call_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Iterate over the operations of a graph, which may change under way."""
    return (node for node in list(graph.nodes) if node.op == "call_function")


def has_floating_output(node: fx.Node) -> bool:
    """Say whether any output of a node is floating point."""
    return any(map(differentiable, output_tensors(node)))


def output_tensors(node: fx.Node) -> list[Tensor]:
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


def varying_slots(node: fx.Node) -> dict[int, str]:
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
        for value in output_tensors(node)
    )


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """Return the parameter, buffer or other tensor at a dotted path below a model."""
    tensor: Tensor = attrgetter(path)(model)
    return tensor


def has_tensor(model: nn.Module, path: str) -> bool:
    """Say whether a model has a tensor, registered or not, at a dotted path."""
    try:
        return isinstance(tensor_at(model, path), Tensor)
    except AttributeError:
        return False
