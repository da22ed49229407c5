"""A pass: what a float64 model computes in float32 inside is computed in float64.

``x.float()`` in a norm or an attention is written for half precision, which it gives more digits.
In a float64 model it takes digits away, by accident: all the rest would add up to 1e-12, and the
parts in float32 only to what their rounding is after all that magnifies it.

A model is left as it is where more digits are not all that would change: where a decision (a
comparison, an index, a rounding) depends on what was in float32, which may come out differently on
a boundary; where an operator of the user's takes float32, which may have no other kernel; where
weights of float32 say that this is its type; and where it goes to half precision on purpose.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fxshap.graph.dataflow import value_sources
from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import CASTS, call_nodes, has_floating_output, op_packet, output_tensors
from fxshap.ops.dtypes import differentiable, runs_in_every_dtype

aten = torch.ops.aten

PROMOTED = {torch.float32: torch.float64, torch.complex64: torch.complex128}
#: Functions of floating-point numbers that jump, beside those that give no such numbers.
JUMPS = (
    aten.sign, aten.sgn, aten.floor, aten.ceil, aten.round, aten.trunc, aten.fix, aten.frac,
    aten.heaviside, aten.threshold, aten.hardshrink, aten.fmod, aten.remainder, aten.floor_divide,
    aten.copysign, aten.atan2, aten.arctan2, aten.fake_quantize_per_tensor_affine,
    aten.fake_quantize_per_channel_affine,
)  # fmt: skip


def promote_to_float64(graph: fx.Graph, varying: Collection[fx.Node]) -> fx.Graph:
    """Compute what depends on the input of a float64 model in float64 throughout, in place.

    Parameters
    ----------
    graph : fx.Graph
        A functional ATen graph.
    varying : collection of fx.Node
        The nodes that depend on the values of the input. Others keep their type, and the rounding
        of their values, and are cast where these meet them.
    """
    explained = [node for node in varying if node.op == "placeholder"]
    if any(node.meta["val"].dtype != torch.float64 for node in explained):
        return graph
    rounded = descendants(graph, [node for node in varying if is_rounded(node)])
    if not rounded or any(map(decides, rounded)):
        return graph
    reached = descendants(graph, varying)
    met = dict.fromkeys(
        source
        for node in reached
        for source in node.all_input_nodes
        if source not in reached and is_low_precision(source)
    )
    if not is_double(graph, met) or not all(map(has_float64_form, reached)):
        return graph
    output = next(node for node in graph.nodes if node.op == "output")
    dtype = output.args[0].meta["val"].dtype
    wide = {source: cast(graph, source, PROMOTED[source.meta["val"].dtype]) for source in met}
    for node in reached:
        if node.op == "call_function":
            promote_node(graph, node, wide)
    result = output.args[0]
    if result.meta["val"].dtype != dtype:
        output.args = (cast(graph, result, dtype),)
    graph.eliminate_dead_code()
    return graph


def lowest_precision(varying: Collection[fx.Node], dtype: torch.dtype) -> torch.dtype:
    """Return the type with the fewest digits in which a model computes what depends on its input.

    Parameters
    ----------
    varying : collection of fx.Node
        The nodes of a captured graph that depend on the input.
    dtype : torch.dtype
        Of the input.
    """
    nodes = [node for node in varying if node.op == "call_function" and not casts_whole(node)]
    types = {v.dtype for node in nodes for v in output_tensors(node) if v.is_floating_point()}
    return max({dtype, *types}, key=lambda found: torch.finfo(found).eps)


# --- whether -------------------------------------------------------------------------------------


def descendants(graph: fx.Graph, roots: Collection[fx.Node]) -> dict[fx.Node, None]:
    """Return `roots` and all that takes a tensor made of them, be it for its shape, in order."""
    found = set(roots)
    for node in call_nodes(graph):
        if any(source in found and output_tensors(source) for source in node.all_input_nodes):
            found.add(node)
    return dict.fromkeys(node for node in graph.nodes if node in found)


def is_double(graph: fx.Graph, met: Collection[fx.Node]) -> bool:
    """Say whether weights have at least as many numbers in float64 as are `met` in float32."""
    values = [node.meta["val"] for node in graph.nodes if node.op == "get_attr"]
    double = sum(value.numel() for value in values if value.dtype == torch.float64)
    single = sum(node.meta["val"].numel() for node in met if node.op == "get_attr")
    return bool(single <= double)


def is_rounded(node: fx.Node) -> bool:
    """Say whether an operation gives float32 that may have lost digits."""
    return node.op == "call_function" and is_low_precision(node) and not casts_whole(node)


def casts_whole(node: fx.Node) -> bool:
    """Say whether a node casts whole numbers or booleans, which lose nothing."""
    return op_packet(node) in CASTS and not has_floating_output(node.all_input_nodes[0])


def decides(node: fx.Node) -> bool:
    """Say whether an operation jumps: gives integers or booleans, or is one of those that do."""
    whole = not all(map(differentiable, output_tensors(node)))
    jumps = op_packet(node) in JUMPS or node.kwargs.get("rounding_mode") is not None
    return jumps or (whole and bool(value_sources(node)))


def has_float64_form(node: fx.Node) -> bool:
    """Say whether an operation is the same in float64, but for its digits."""
    values = [v for part in (node, *node.all_input_nodes) for v in output_tensors(part)]
    floats = {value.dtype for value in values if differentiable(value)}
    if floats - set(PROMOTED) - set(PROMOTED.values()):
        return False  # half precision, on purpose
    return floats.isdisjoint(PROMOTED) or runs_in_every_dtype(node.target)


# --- how -----------------------------------------------------------------------------------------


def promote_node(graph: fx.Graph, node: fx.Node, wide: dict[fx.Node, fx.Node]) -> None:
    """Give an operation wide arguments and a wide result, or leave it out if it is a cast."""
    for source in node.all_input_nodes:
        if source in wide:
            node.replace_input_with(source, wide[source])
    source = node.all_input_nodes[0]
    if op_packet(node) in CASTS and is_same(node, source):
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        return
    if not is_low_precision(node):
        return
    given = (node.args, dict(node.kwargs))
    node.args, node.kwargs = map_aggregate(given, promoted)
    if given == (node.args, node.kwargs) and not any(
        map(has_floating_output, node.all_input_nodes)
    ):
        # Of whole numbers, in the default type.
        after = cast(graph, node, PROMOTED[node.meta["val"].dtype])
        node.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    else:
        node.meta["val"] = pytree.tree_map(in_promoted, node.meta["val"])


def cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Add a cast behind a node."""
    with graph.inserting_before(node.next):
        found: fx.Node = insert_call(graph, node, aten._to_copy.default, node, dtype=dtype)
    return found


def is_same(node: fx.Node, source: fx.Node) -> bool:
    """Say whether a cast to the wider type leaves its source as it is."""
    a, b = node.meta["val"], source.meta["val"]
    return bool(a.device == b.device and promoted(a.dtype) == b.dtype)


def promoted(argument: Any) -> Any:
    """Return the wider type for a narrow one, and anything else as it is."""
    return PROMOTED.get(argument, argument) if isinstance(argument, torch.dtype) else argument


def in_promoted(value: Any) -> Any:
    """Return a fake value in the wider type, and anything that is not narrow as it is."""
    return value.to(promoted(value.dtype)) if isinstance(value, Tensor) else value


def is_low_precision(node: fx.Node) -> bool:
    """Say whether a node gives float32, or complex numbers of it."""
    return any(value.dtype in PROMOTED for value in output_tensors(node))
