"""Checks that a model does not compute with the number of rows, as in ``x / x.size(0)``.

A row then has another output in every batch. Kernels round differently for another number of rows,
so runs of the model cannot tell this from rounding. The captured graph can.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxshap.capture.captured import Captured
from fxshap.errors import BatchMixingError
from fxshap.graph.nodes import call_nodes, has_floating_output, is_operator, op_packet, size_key
from fxshap.graph.provenance import source_line, user_module

aten = torch.ops.aten

#: Numbers of rows for which a size is compared.
SOME_NUMBERS = (2, 3, 5, 7)

#: Operations that make a tensor of a number, often an integer.
CONSTANTS = (aten.scalar_tensor, aten.full)

#: The types of arguments that are numbers to compute with, and no sizes or dimensions.
NUMBERS = (torch.TensorType, torch.NumberType, torch.FloatType)


def check_any_number(captured: Captured) -> None:
    """Raise a BatchMixingError if a graph for any number of rows computes with their number."""
    graph = captured.module.graph
    inputs = graph.find_nodes(op="placeholder")
    symbols = {symbol for n in inputs for symbol in symbols_of(n.meta["val"].shape[0])}
    if not symbols:
        return
    for node in call_nodes(graph):
        for argument in numbers(node):
            value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
            if depends_on(value, symbols):
                raise_at(node)


def check_fixed_number(captured: Captured, other: Captured) -> None:
    """Raise a BatchMixingError if graphs for two numbers of rows differ in a number.

    Parameters
    ----------
    captured, other : Captured
        Of one model.
    """
    graphs = captured.module.graph, other.module.graph
    pairs = list(zip(*map(call_nodes, graphs), strict=False))
    if any(a.target is not b.target for a, b in pairs):
        return
    for node, same in pairs:
        for a, b in zip(numbers(node), numbers(same), strict=False):
            if isinstance(a, int | float) and isinstance(b, int | float) and a != b:
                raise_at(node)


def numbers(node: fx.Node) -> Iterator[Any]:
    """Iterate over the arguments of a node that are numbers to compute with, or tensors.

    Operations that draw random numbers have none: they are rejected by name.
    """
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return
    if is_operator(node) and (has_floating_output(node) or op_packet(node) in CONSTANTS):
        schema: Any = node.target
        arguments = schema._schema.arguments
        given = {a.name: value for a, value in zip(arguments, node.args, strict=False)}
        given |= node.kwargs
        for argument in arguments:
            if argument.name in given and is_number(argument.type):
                yield given[argument.name]


def is_number(kind: Any) -> bool:
    """Return True if an argument of this type is a number to compute with, or a tensor."""
    if isinstance(kind, torch.OptionalType):
        kind = kind.getElementType()
    return isinstance(kind, NUMBERS)


def symbols_of(size: Any) -> set[Any]:
    """Return the symbols of a symbolic size or number; none of any other value."""
    if isinstance(size, torch.SymInt | torch.SymFloat):
        symbols: set[Any] = size.node.expr.free_symbols
        return symbols
    return set()


def depends_on(value: Any, symbols: set[Any]) -> bool:
    """Return True if a symbolic number differs with the number of rows.

    Sizes cancel in ``x.numel() / len(x)``.
    """
    own = symbols_of(value)
    if not own or not own <= symbols:
        return False
    expression = size_key(value) if isinstance(value, torch.SymInt) else value.node.expr
    values = {float(expression.subs(dict.fromkeys(own, rows))) for rows in SOME_NUMBERS}
    return len(values) > 1


def raise_at(node: fx.Node) -> None:
    """Raise a BatchMixingError that names the line of a node."""
    module = user_module(node)
    raise BatchMixingError(
        f"the model computes with the number of rows{f' in {module}' if module else ''}, at "
        f"{source_line(node)} (as in `x / x.size(0)`), so a row has another output in every batch "
        "and no attributions of its own; use the number of features, or a constant"
    )
