"""Adding calls, functions and traced graphs to a graph, with the provenance of another node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from fxshap.graph.dataflow import value_sources
from fxshap.graph.provenance import provenance_of

aten = torch.ops.aten


def insert_call(
    graph: fx.Graph,
    like: fx.Node,
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    meta: Mapping[str, Any] | None = None,
) -> fx.Node:
    """Add a call at the insertion point of a graph, with the provenance of another node.

    Parameters
    ----------
    graph : fx.Graph
        Changed in place.
    like : fx.Node
        The node that the call replaces or belongs to.
    target : callable
        The operator or Python function to call.
    args, kwargs : sequence, mapping
        The arguments of the call.
    name : str, optional
        The name of the new node.
    meta : mapping, optional
        Entries of the new node's ``meta``. Without ``"val"``, the call runs on fake values. Without
        ``"varying"``, it follows from the arguments.
    """
    node = graph.create_node("call_function", target, tuple(args), dict(kwargs or {}), name=name)
    node.meta = {**provenance_of(like), **(meta or {})}
    if "val" not in node.meta:
        node.meta["val"] = fake_output(node, like)
    if "varying" not in node.meta:
        node.meta["varying"] = reads_varying(node)
    return node


def fake_output(node: fx.Node, like: fx.Node) -> Any:
    """Return the output of a call on the fake values of its arguments.

    The fake tensor mode is that of the arguments, or else that of another node.
    """
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    leaves = pytree.tree_leaves((args, kwargs, like.meta["val"]))
    modes = (leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    with next(modes, nullcontext()):  # there is none if all are sizes
        return target(*args, **kwargs)


def reads_varying(node: fx.Node) -> bool:
    """Return True if a node depends on the values of an argument that depends on the input."""
    return any(source.meta.get("varying", False) for source in value_sources(node))


def insert_function(
    graph: fx.Graph, like: fx.Node, function: Callable[..., Any], *inputs: fx.Node, **tracing: bool
) -> Any:
    """Trace a function of tensors and add its calls; return the nodes of its result."""
    traced = trace_function(function, [node.meta["val"] for node in inputs], **tracing)
    return inline_graph(graph, traced, inputs, like)


def trace_function(
    function: Callable[..., Any], values: Sequence[Any], *, pre_dispatch: bool = True
) -> fx.Graph:
    """Return the graph of a function at fake values. ``torch.vmap`` needs `pre_dispatch` False."""
    fake = next(value for value in values if isinstance(value, Tensor))
    with fake.fake_mode:  # type: ignore[attr-defined]
        return make_fx(function, pre_dispatch=pre_dispatch)(*values).graph


def inline_graph(
    graph: fx.Graph, traced: fx.Graph, inputs: Sequence[fx.Node], like: fx.Node
) -> Any:
    """Copy a traced graph to the insertion point of another graph; return the nodes of its result.

    Parameters
    ----------
    graph : fx.Graph
        Changed in place.
    traced : fx.Graph
        A graph of one result, whose node is returned, or of several, in a tuple.
    inputs : sequence of fx.Node
        The nodes of `graph` that replace the placeholders.
    like : fx.Node
        The node whose provenance the copied nodes get.
    """
    remaining = iter(inputs)
    provenance = provenance_of(like)
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.nodes:
        if node.op == "placeholder":
            copies[node] = next(remaining)
        elif node.op == "output":
            return fx.map_arg(node.args[0], copies.__getitem__)
        else:
            copies[node] = copied = graph.node_copy(node, copies.__getitem__)
            copied.meta = {"val": node.meta.get("val"), **provenance}
            copied.meta["varying"] = reads_varying(copied)
    raise AssertionError("a graph without an output")
