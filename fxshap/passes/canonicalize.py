"""Passes that give equivalent nodes one form, so that later passes and rules have fewer cases."""

from __future__ import annotations

import sys

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxshap.graph.dataflow import IDENTITIES
from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import arguments_by_name, call_args, call_nodes, op_packet
from fxshap.passes.context import Context

aten = torch.ops.aten


#: Operations that check their arguments and compute nothing.
ASSERTIONS = (
    aten._assert_async, aten._assert_scalar, aten._assert_tensor_metadata,
    aten._functional_assert_async, aten._functional_assert_scalar, torch._assert,
)  # fmt: skip

#: Operations that need an input of matching strides, which the output of a rule may not have.
VIEWS = (aten.view, aten._unsafe_view)


def drop_identities(graph: fx.Graph, context: Context) -> fx.Graph:
    """Remove copies, detachments and assertions, which change nothing in a functional graph.

    So do slices of all entries: ``x[:, 0]`` is a slice and a selection.
    """
    for node in call_nodes(graph):
        unfold_copy(node)
        if (op_packet(node) in IDENTITIES and "keep" not in node.meta) or is_full_slice(node):
            node.replace_all_uses_with(call_args(node)[0])
            graph.erase_node(node)
        elif op_packet(node) in ASSERTIONS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph


def is_full_slice(node: fx.Node) -> bool:
    """Return True for ``x[:]`` along a dimension."""
    if node.target is not aten.slice.Tensor:
        return False
    given = arguments_by_name(node)
    whole = given["start"] in (0, None) and given["end"] in (sys.maxsize, None)
    return whole and given["step"] == 1


def unfold_copy(node: fx.Node) -> None:
    """Turn what overwrites all of a tensor into what it writes: ``copy``, ``fill`` and ``zero``."""
    graph = node.graph
    if op_packet(node) is aten.zero:
        node.target = aten.zeros_like.default
    elif node.target is aten.fill.Scalar:
        node.target = aten.full_like.default
    elif op_packet(node) is aten.copy or node.target is aten.fill.Tensor:
        old, new, *_ = node.args
        if isinstance(old, fx.Node) and isinstance(new, fx.Node):
            dtype = old.meta["val"].dtype
            if new.meta["val"].dtype != dtype:
                with graph.inserting_before(node):
                    cast = {"dtype": dtype}
                    new = insert_call(graph, node, aten._to_copy.default, (new,), cast)
            node.target, node.args = aten.expand_as.default, (new, old)


def fix_squeezed_dims(graph: fx.Graph, context: Context) -> fx.Graph:
    """Make every ``squeeze`` name the dimensions that it removes: those of size 1 in the capture.

    Otherwise ``squeeze()`` and ``squeeze(0)`` would also remove the batch dimension of a single
    row.
    """
    for node in call_nodes(graph):
        if op_packet(node) is aten.squeeze:
            x, *dims = call_args(node)
            sizes = x.meta["val"].shape
            given = pytree.tree_leaves(dims) if dims else range(len(sizes))
            named = [dim % len(sizes) for dim in given if sizes]
            removed = [dim for dim in named if isinstance(sizes[dim], int) and sizes[dim] == 1]
            node.target, node.args, node.kwargs = aten.squeeze.dims, (x, removed), {}
    return graph


def sort_topk(graph: fx.Graph, context: Context) -> fx.Graph:
    """Make every top-k return its values in order, which the rules rely on."""
    for node in call_nodes(graph):
        if op_packet(node) is aten.topk:  # its last argument is `sorted`, True by default
            node.args = node.args[:4]
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "sorted"}
    return graph


def reshape_views(graph: fx.Graph, context: Context) -> fx.Graph:
    """Turn views into operations that serve any strides, of values and of gradients.

    ``view`` becomes ``reshape``. ``view_as_complex`` joins the real and the imaginary parts, and
    ``view_as_real`` stacks them.
    """
    for node in call_nodes(graph):
        with graph.inserting_before(node):
            if op_packet(node) in VIEWS and node.target is not aten.view.dtype:
                node.target = aten.reshape.default
            elif op_packet(node) is aten.view_as_complex:
                (pairs,) = call_args(node)
                parts = [insert_call(graph, node, aten.select.int, (pairs, -1, k)) for k in (0, 1)]
                node.target, node.args = aten.complex.default, tuple(parts)
            elif op_packet(node) is aten.view_as_real:
                (z,) = call_args(node)
                parts = [
                    insert_call(graph, node, part.default, (z,)) for part in (aten.real, aten.imag)
                ]
                node.target, node.args = aten.stack.default, (parts, -1)
    return graph
