"""Compute in float64 what a float64 model computes in float32 inside.

``x.float()`` in a norm or an attention is written for half precision, to which it adds digits. In a
float64 model it removes digits, by accident: everything else would add up to 1e-12, and the parts
in float32 add up only to their rounding error, which later operations may magnify.

A model is left as it is if promotion could change more than rounding:

- A decision (a comparison, an index, a rounding) depends on a float32 value, and may differ at a
  boundary.
- A custom operator takes float32, and may have no other kernel.
- Most weights are float32, so this is the model's type.
- The model goes to half precision on purpose.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fxshap.graph.dataflow import value_sources, varying_nodes
from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import CASTS, call_nodes, has_floating_output, op_packet, output_tensors
from fxshap.ops.dtypes import differentiable, is_floating, runs_in_every_dtype
from fxshap.passes.context import Context

aten = torch.ops.aten

PROMOTED = {torch.float32: torch.float64, torch.complex64: torch.complex128}
#: Functions with floating-point outputs that jump. Those with integer or boolean outputs do too.
JUMPS = (
    aten.sign, aten.sgn, aten.floor, aten.ceil, aten.round, aten.trunc, aten.fix, aten.frac,
    aten.heaviside, aten.threshold, aten.hardshrink, aten.fmod, aten.remainder, aten.floor_divide,
    aten.copysign, aten.atan2, aten.arctan2, aten.fake_quantize_per_tensor_affine,
    aten.fake_quantize_per_channel_affine,
)  # fmt: skip


def record_compute_dtype(graph: fx.Graph, context: Context) -> fx.Graph:
    """Record the least precise type in which the model computes what depends on its input."""
    computed = [
        value.dtype
        for node in varying_nodes(graph)
        if node.op == "call_function" and not casts_exactly(node)
        for value in output_tensors(node)
        if is_floating(value)
    ]
    context.compute_dtype = max(
        (context.input_dtype, *computed), key=lambda dtype: torch.finfo(dtype).eps
    )
    return graph


def promote_to_float64(graph: fx.Graph, context: Context) -> fx.Graph:
    """Compute what depends on the input of a float64 model in float64 throughout, in place.

    Constants keep their type and the rounding of their values. They are cast where they are used.
    """
    varying = varying_nodes(graph)
    inputs = [node for node in varying if node.op == "placeholder"]
    if any(node.meta["val"].dtype != torch.float64 for node in inputs):
        return graph
    rounded = descendants(graph, [node for node in varying if is_rounded(node)])
    if not rounded or any(map(decides, rounded)):
        return graph
    reached = descendants(graph, varying)
    constants = dict.fromkeys(
        source
        for node in reached
        for source in node.all_input_nodes
        if source not in reached and is_single_precision(source)
    )
    if mostly_double(graph, constants) and all(map(has_float64_form, reached)):
        promote_nodes(graph, reached, constants)
    return graph


# --- whether to promote --------------------------------------------------------------------------


def descendants(graph: fx.Graph, roots: Collection[fx.Node]) -> dict[fx.Node, None]:
    """Return `roots` and all nodes that take tensors made of them, even for the shape, in order."""
    reached = set(roots)
    for node in call_nodes(graph):
        if any(source in reached and output_tensors(source) for source in node.all_input_nodes):
            reached.add(node)
    return dict.fromkeys(node for node in graph.nodes if node in reached)


def mostly_double(graph: fx.Graph, constants: Collection[fx.Node]) -> bool:
    """Return True if no more elements of weights are in float32 constants than in float64."""
    values = [node.meta["val"] for node in graph.nodes if node.op == "get_attr"]
    double = sum(value.numel() for value in values if value.dtype == torch.float64)
    single = sum(node.meta["val"].numel() for node in constants if node.op == "get_attr")
    return bool(single <= double)


def is_rounded(node: fx.Node) -> bool:
    """Return True if an operation gives float32 that may have lost digits."""
    return node.op == "call_function" and is_single_precision(node) and not casts_exactly(node)


def casts_exactly(node: fx.Node) -> bool:
    """Return True if a node casts integers or booleans, which lose nothing."""
    return op_packet(node) in CASTS and not has_floating_output(node.all_input_nodes[0])


def decides(node: fx.Node) -> bool:
    """Return True if an operation jumps: its outputs are not all floating-point, or it rounds."""
    jumps = op_packet(node) in JUMPS or node.kwargs.get("rounding_mode") is not None
    discrete = not all(map(differentiable, output_tensors(node)))
    return jumps or (discrete and bool(value_sources(node)))


def has_float64_form(node: fx.Node) -> bool:
    """Return True if an operation computes the same in float64, with more digits."""
    values = [value for each in (node, *node.all_input_nodes) for value in output_tensors(each)]
    dtypes = {value.dtype for value in values if differentiable(value)}
    if dtypes - set(PROMOTED) - set(PROMOTED.values()):
        return False  # half precision, on purpose
    return dtypes.isdisjoint(PROMOTED) or runs_in_every_dtype(node.target)


# --- promotion -----------------------------------------------------------------------------------


def promote_nodes(
    graph: fx.Graph, reached: Collection[fx.Node], constants: Collection[fx.Node]
) -> None:
    """Promote nodes and the float32 constants that they use; the model's output keeps its type."""
    output = graph.output_node()
    (result,) = output.all_input_nodes
    dtype = result.meta["val"].dtype
    double = {
        node: insert_cast(graph, node, PROMOTED[node.meta["val"].dtype]) for node in constants
    }
    for node in reached:
        if node.op == "call_function":
            promote_node(graph, node, double)
    (result,) = output.all_input_nodes
    if result.meta["val"].dtype != dtype:
        output.args = (insert_cast(graph, result, dtype),)
    graph.eliminate_dead_code()


def promote_node(graph: fx.Graph, node: fx.Node, double: dict[fx.Node, fx.Node]) -> None:
    """Give an operation float64 arguments and a float64 result, or drop it if it is a cast.

    Parameters
    ----------
    double : dict of Node to Node
        The casts of float32 constants to float64.
    """
    for source in node.all_input_nodes:
        if source in double:
            node.replace_input_with(source, double[source])
    source = node.all_input_nodes[0]
    if op_packet(node) in CASTS and is_redundant_cast(node, source):
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        return
    if not is_single_precision(node):
        return
    before = (node.args, dict(node.kwargs))
    node.args, node.kwargs = map_aggregate(before, promoted)
    unchanged = before == (node.args, node.kwargs)
    if unchanged and not any(map(has_floating_output, node.all_input_nodes)):
        # A function of integers that returns floats of the default type.
        cast = insert_cast(graph, node, PROMOTED[node.meta["val"].dtype])
        node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    else:
        node.meta["val"] = pytree.tree_map(promoted_value, node.meta["val"])


def insert_cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Add a cast after a node."""
    with graph.inserting_before(node.next):
        return insert_call(graph, node, aten._to_copy.default, (node,), {"dtype": dtype})


def is_redundant_cast(node: fx.Node, source: fx.Node) -> bool:
    """Return True if a cast, once promoted, leaves its source as it is."""
    value, source_value = node.meta["val"], source.meta["val"]
    same_device = value.device == source_value.device
    return bool(same_device and promoted(value.dtype) == source_value.dtype)


def promoted(argument: Any) -> Any:
    """Return float64 for float32, likewise for complex types, and anything else as it is."""
    return PROMOTED.get(argument, argument) if isinstance(argument, torch.dtype) else argument


def promoted_value(value: Any) -> Any:
    """Return a fake tensor in its promoted type, and anything else as it is."""
    return value.to(promoted(value.dtype)) if isinstance(value, Tensor) else value


def is_single_precision(node: fx.Node) -> bool:
    """Return True if an output of a node is float32, or complex of two float32."""
    return any(value.dtype in PROMOTED for value in output_tensors(node))
