"""Properties of the nodes of a captured or rewritten graph."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import differentiable, is_floating
from fxshap.ops.schemas import argument_names, named_arguments

aten = torch.ops.aten

CASTS = (aten._to_copy, aten.to, aten.type_as)


# --- operators and their arguments --------------------------------------------------------------


def call_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Iterate over the calls of a graph, which may be changed meanwhile."""
    return (node for node in list(graph.nodes) if node.op == "call_function")


def op_packet(node: fx.Node) -> Any:
    """Return the operator packet of a node, such as ``aten.relu`` of ``aten.relu.default``.

    For a Python function, such as ``operator.getitem``, return the function.
    """
    return getattr(node.target, "overloadpacket", node.target)


def is_operator(node: fx.Node) -> bool:
    """Return True if a node calls an operator of torch, and not a Python function."""
    return isinstance(node.target, OpOverload)


def call_args(node: fx.Node) -> tuple[Any, ...]:
    """Return the positional arguments of a node, for the type checker as values of any type."""
    return node.args


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a node by name, defaults included."""
    return named_arguments(node.target, node.args, node.kwargs)


def varying_arguments(node: fx.Node) -> list[tuple[int, fx.Node]]:
    """Return (argument position, node) for every argument that depends on the input."""
    arguments = list(enumerate(node.args))
    if any(nodes_in(argument) for argument in node.kwargs.values()):
        names = argument_names(node.target)
        arguments += [
            (names.index(key), argument)
            for key, argument in node.kwargs.items()
            if nodes_in(argument)
        ]
    return [
        (position, source)
        for position, argument in arguments
        for source in nodes_in(argument)
        if source.meta["varying"]
    ]


def nodes_in(argument: Any) -> list[fx.Node]:
    """Return the nodes in an argument, which may be a list."""
    return [leaf for leaf in pytree.tree_leaves(argument) if isinstance(leaf, fx.Node)]


def varying_slots(node: fx.Node) -> dict[int, str]:
    """Return {slot: name of the node} for the flattened arguments that depend on the input."""
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return {
        slot: leaf.name
        for slot, leaf in enumerate(leaves)
        if isinstance(leaf, fx.Node) and leaf.meta["varying"]
    }


# --- values --------------------------------------------------------------------------------------


def output_tensors(node: fx.Node) -> list[Tensor]:
    """Return the fake tensors among the outputs of a node."""
    return [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]


def is_floating_node(argument: Any) -> bool:
    """Return True if an argument is a node whose output is one real floating-point tensor."""
    return isinstance(argument, fx.Node) and is_floating(argument.meta.get("val"))


def has_floating_output(node: fx.Node) -> bool:
    """Return True if an output of a node is floating-point, real or complex."""
    return any(map(differentiable, output_tensors(node)))


def batch_dims(node: fx.Node) -> tuple[int, ...]:
    """Return the dimension of each output of a node that grows with the batch; 0 if unknown."""
    return tuple(
        next((d for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt)), 0)
        for value in output_tensors(node)
    )


def size_key(size: int | torch.SymInt) -> Any:
    """Return a key that is equal for equal sizes. Comparing symbolic sizes would add a guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def row_sizes(graph: fx.Graph) -> set[Any]:
    """Return the keys of the sizes that count the rows: those of the inputs' first dimensions."""
    values = (node.meta.get("val") for node in graph.find_nodes(op="placeholder"))
    return {size_key(x.shape[0]) for x in values if isinstance(x, Tensor) and x.dim()}


# --- weights -------------------------------------------------------------------------------------


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """Return the parameter, buffer or other tensor at a dotted path below a model."""
    tensor: Tensor = attrgetter(path)(model)
    return tensor


def has_tensor(model: nn.Module, path: str) -> bool:
    """Return True if a model has a tensor, registered or not, at a dotted path."""
    try:
        return isinstance(tensor_at(model, path), Tensor)
    except AttributeError:
        return False
