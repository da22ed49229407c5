"""A function of tensors as nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def trace_function(
    function: Callable[..., Any], values: Sequence[Any], *, pre_dispatch: bool = True
) -> fx.Graph:
    """Return the graph of a function at fake values; for `torch.vmap`, not before dispatch."""
    fake = next(value for value in values if isinstance(value, Tensor))
    with fake.fake_mode:  # type: ignore[attr-defined]
        return make_fx(function, pre_dispatch=pre_dispatch)(*values).graph


def inline_graph(graph: fx.Graph, parts: fx.Graph, inputs: Sequence[fx.Node], like: fx.Node) -> Any:
    """Copy a traced graph to where another graph is written; return the nodes of its result.

    Parameters
    ----------
    graph : fx.Graph
        Written at its insertion point.
    parts : fx.Graph
        A graph of one result, whose node is returned, or of several, in a tuple.
    inputs : sequence of fx.Node
        What its placeholders stand for.
    like : fx.Node
        The node whose place in the user's model the parts take.
    """
    rest = iter(inputs)
    origin = provenance_of(like)
    copies: dict[fx.Node, fx.Node] = {}
    for part in parts.nodes:
        if part.op == "placeholder":
            copies[part] = next(rest)
        elif part.op == "output":
            return fx.map_arg(part.args[0], copies.__getitem__)
        else:
            copies[part] = graph.node_copy(part, copies.__getitem__)
            varying = any(source.meta.get("varying") for source in value_sources(copies[part]))
            copies[part].meta = {"val": part.meta.get("val"), "varying": varying, **origin}
    raise AssertionError("a graph without an output")


def insert_function(
    graph: fx.Graph, like: fx.Node, function: Callable[..., Any], *inputs: fx.Node, **tracing: bool
) -> Any:
    """Write a function of tensors where a graph is written; return the nodes of its result."""
    parts = trace_function(function, [node.meta["val"] for node in inputs], **tracing)
    return inline_graph(graph, parts, inputs, like)


def insert_call(
    graph: fx.Graph, like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
) -> fx.Node:
    """Add a call where a graph is written, from the place of `like` in the user's model."""
    node = graph.call_function(target, args, kwargs)
    given, named = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
    leaves = pytree.tree_leaves((given, named, like.meta["val"]))
    modes = (leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor))
    with next(modes, nullcontext()):  # there is none for sizes alone
        node.meta = {**provenance_of(like), "val": target(*given, **named)}
    return node
