"""A pass: what a float64 model computes in float32 inside is computed in float64.

``x.float()`` in a norm or an attention is written for half precision, which it gives more digits.
In a float64 model it takes digits away, by accident: all the rest would add up to 1e-12, and the
parts in float32 only to what their rounding is after all that magnifies it. A model whose weights
are of float32 is not touched, nor is one that goes to half precision on purpose.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fxshap.nodes import calls, gives_floats, packet
from fxshap.parts import call

aten = torch.ops.aten

WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}
CASTS = (aten._to_copy, aten.to)
#: What marks a widened node, with the type that the model computes it in.
COMPUTED_IN = "computed_in"
#: Where operators have kernels for float64 too.
NAMESPACES = ("aten", "prims", "fxshap")


def widen(graph: fx.Graph, varying: Container[fx.Node]) -> fx.Graph:
    """Compute what depends on the input of a float64 model in float64 throughout, in place.

    Parameters
    ----------
    graph : fx.Graph
        A functional ATen graph.
    varying : container of fx.Node
        The nodes that depend on the values of the input. Others keep their type, and the rounding
        of their values, and are cast where these meet them.
    """
    if not any(node in varying and is_narrow(node) for node in calls(graph)):
        return graph
    reached = reachable(graph)
    if not (is_double(graph, varying) and all(map(has_wide_form, reached))):
        return graph
    output = next(node for node in graph.nodes if node.op == "output")
    result = output.args[0]
    dtype = result.meta["val"].dtype
    for node in reached:
        widen_node(graph, node)
    result = output.args[0]
    if result.meta["val"].dtype != dtype:
        with graph.inserting_before(output):
            output.args = (call(graph, result, aten._to_copy.default, result, dtype=dtype),)
    graph.eliminate_dead_code()
    return graph


def narrowest(graph: fx.Graph, dtype: torch.dtype) -> torch.dtype:
    """Return the type with the fewest digits in which a model computes what depends on its input.

    Parameters
    ----------
    graph : fx.Graph
        One of the rewritten graphs.
    dtype : torch.dtype
        Of the input.
    """
    varying = [node for node in graph.nodes if node.meta.get("varying")]
    types = {v.dtype for node in varying for v in tensors_of(node) if v.is_floating_point()}
    types |= {node.meta[COMPUTED_IN] for node in varying if COMPUTED_IN in node.meta}
    return max({dtype, *types}, key=lambda found: torch.finfo(found).eps)


def reachable(graph: fx.Graph) -> list[fx.Node]:
    """Return the operations that take an input or anything made of it, be it for its shape."""
    found = dict.fromkeys(node for node in graph.nodes if node.op == "placeholder")
    inputs = len(found)
    for node in calls(graph):
        if any(source in found for source in node.all_input_nodes):
            found[node] = None
    return list(found)[inputs:]


def is_double(graph: fx.Graph, varying: Container[fx.Node]) -> bool:
    """Say whether a model is of float64: what is explained, and most numbers of its weights."""
    numbers = {torch.float32: 0, torch.float64: 0}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node in varying and value.dtype != torch.float64:
            return False
        if node.op == "get_attr" and value.dtype in numbers:
            numbers[value.dtype] += value.numel()
    return numbers[torch.float32] <= numbers[torch.float64]


def has_wide_form(node: fx.Node) -> bool:
    """Say whether an operation is the same in float64, but for its digits."""
    values = [v for part in (node, *node.all_input_nodes) for v in tensors_of(part)]
    floats = {v.dtype for v in values if v.is_floating_point() or v.is_complex()}
    if floats - set(WIDER) - set(WIDER.values()):
        return False  # half precision, on purpose
    by_bits = node.target in (aten.view.dtype, aten.view_copy.dtype)
    return not by_bits and (floats.isdisjoint(WIDER) or namespace(node) in NAMESPACES)


def namespace(node: fx.Node) -> str:
    """Return the library of an operator; functions of Python are taken for ATen's."""
    return getattr(node.target, "namespace", "aten")


def widen_node(graph: fx.Graph, node: fx.Node) -> None:
    """Give an operation wide arguments and a wide result, or leave it out if it is a cast."""
    with graph.inserting_before(node):
        for source in node.all_input_nodes:
            if is_narrow(source):
                node.replace_input_with(source, cast(graph, source))
    source = node.all_input_nodes[0]
    is_cast = packet(node) in CASTS
    if is_cast and is_same(node, source):
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        return
    if not is_narrow(node):
        return
    if not is_cast or gives_floats(source):  # whole numbers lose nothing
        node.meta[COMPUTED_IN] = torch.float32
    given = (node.args, dict(node.kwargs))
    node.args, node.kwargs = map_aggregate(given, wider)
    if given == (node.args, node.kwargs) and not any(map(gives_floats, node.all_input_nodes)):
        with graph.inserting_before(node.next):  # of whole numbers, the default type
            wide = cast(graph, node)
        node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    else:
        node.meta["val"] = pytree.tree_map(in_wider, node.meta["val"])


def cast(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Add a cast to the wider type."""
    dtype = WIDER[node.meta["val"].dtype]
    wide: fx.Node = call(graph, node, aten._to_copy.default, node, dtype=dtype)
    return wide


def is_same(node: fx.Node, source: fx.Node) -> bool:
    """Say whether a cast to the wider type leaves its source as it is."""
    a, b = node.meta["val"], source.meta["val"]
    return bool(a.device == b.device and wider(a.dtype) == b.dtype)


def wider(argument: Any) -> Any:
    """Return the wider type for a narrow one, and anything else as it is."""
    return WIDER.get(argument, argument) if isinstance(argument, torch.dtype) else argument


def in_wider(value: Any) -> Any:
    """Return a fake value in the wider type, and anything that is not narrow as it is."""
    return value.to(wider(value.dtype)) if isinstance(value, Tensor) else value


def is_narrow(node: fx.Node) -> bool:
    """Say whether a node gives float32."""
    return any(value.dtype in WIDER for value in tensors_of(node))


def tensors_of(node: fx.Node) -> list[Tensor]:
    """Return the tensors among what a node gives."""
    return [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
