"""A function of tensors as nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

#: What says where in the user's model a node came from.
ORIGIN = ("nn_module_stack", "stack_trace")


def traced(
    function: Callable[..., Any], values: Sequence[Any], *, pre_dispatch: bool = True
) -> fx.Graph:
    """Return the graph of a function at fake values; for `torch.vmap`, not before dispatch."""
    fake = next(value for value in values if isinstance(value, Tensor))
    with fake.fake_mode:  # type: ignore[attr-defined]
        return make_fx(function, pre_dispatch=pre_dispatch)(*values).graph


def put_in(graph: fx.Graph, parts: fx.Graph, inputs: Sequence[fx.Node], like: fx.Node) -> fx.Node:
    """Copy a traced graph to where another graph is written; return the node of its result.

    Parameters
    ----------
    graph : fx.Graph
        Written at its insertion point.
    parts : fx.Graph
        A graph of one result.
    inputs : sequence of fx.Node
        What its placeholders stand for.
    like : fx.Node
        The node whose place in the user's model the parts take.
    """
    rest = iter(inputs)
    origin = {key: like.meta[key] for key in ORIGIN if key in like.meta}
    copies: dict[fx.Node, fx.Node] = {}
    for part in parts.nodes:
        if part.op == "placeholder":
            copies[part] = next(rest)
        elif part.op == "output":
            return copies[part.args[0]]
        else:
            copies[part] = graph.node_copy(part, copies.__getitem__)
            varying = any(source.meta.get("varying") for source in copies[part].all_input_nodes)
            copies[part].meta = {"val": part.meta.get("val"), "varying": varying, **origin}
    raise AssertionError("a graph without an output")
