"""Relax booleans that depend on the input to 0/1 floats.

A boolean has no gradient, so whatever passes through ``x > 0`` would be lost. This pass gives every
such boolean, and every integer that depends on the input, a floating-point relaxation:

- A comparison u > v becomes a step of u - v. A cast to integers becomes a truncation.
- Logic and integer arithmetic become their floating-point counterparts.
- ``where`` and ``masked_fill`` become `select` on the relaxed condition.
- ``bucketize`` and ``searchsorted`` count the boundaries that are passed.
- :mod:`fxshap.passes.relax_indices` has the operations that make or use indices.

Booleans that do not depend on the input stay what they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxshap.graph.nodes import CASTS, call_args, call_nodes, is_floating_node, op_packet
from fxshap.ops.dtypes import ACCUMULATE_IN
from fxshap.passes.context import Context
from fxshap.passes.relax_indices import (
    INDEX_USES,
    gives_index,
    is_candidate_check,
    relax_candidate_check,
    relax_index,
    uses_index,
)
from fxshap.passes.relaxation import Relaxation, RelaxFn
from fxshap.rules.core.registry import find_rule

aten = torch.ops.aten
ours = torch.ops.fxshap


COMPARISONS = {
    getattr(aten, name): relation
    for relation, names in {
        "gt": ("gt", "greater"),
        "ge": ("ge", "greater_equal"),
        "lt": ("lt", "less"),
        "le": ("le", "less_equal"),
        "eq": ("eq",),
        "ne": ("ne", "not_equal"),
    }.items()
    for name in names
}


def relax_booleans(graph: fx.Graph, context: Context) -> fx.Graph:
    """Relax every boolean and integer that depends on the input, and use the relaxation."""
    relaxation = Relaxation(graph, context.input_dtype)
    for node in call_nodes(graph):
        if not node.meta["varying"] or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        with graph.inserting_before(node.next):
            relaxed = relax_node(relaxation, node)
        if relaxed is None:
            continue
        if is_floating_node(node):
            replace_other_uses(node, relaxed)
        else:
            relaxation.floats[node] = relaxed
    graph.eliminate_dead_code()
    return graph


def replace_other_uses(node: fx.Node, relaxed: fx.Node) -> None:
    """Replace a node by its relaxation, which may itself use the node."""
    node.replace_all_uses_with(relaxed, delete_user_cb=lambda user: user is not relaxed)


def relax_node(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """Return the floating-point form of a node, or ``None`` if it needs or has none."""
    packet = op_packet(node)
    if packet in COMPARISONS:
        return relax_comparison(relaxation, node)
    if packet in CASTS and is_floating_node(node.args[0]):
        return relax_cast_of_floats(relaxation, node)
    if packet is aten.bucketize:
        return count_passed(relaxation, node, *node.args[:2])
    if packet is aten.searchsorted and node.kwargs.get("sorter") is None:
        return count_passed(relaxation, node, node.args[1], node.args[0])
    if gives_index(node):
        return relax_index(relaxation, node)
    if not any(source in relaxation.floats for source in node.all_input_nodes):
        return None
    if uses_index(relaxation, node):
        return INDEX_USES[packet](relaxation, node)
    return BOOLEAN_USES.get(packet, relax_arithmetic)(relaxation, node)


def relax_arithmetic(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """Return the same operation on floats, if it has a rule with a closed form."""
    target: Any = node.target
    rule = find_rule(target)
    if rule is None or not rule.closed_form or target is operator.getitem:
        return None
    args = fx.map_arg(node.args, lambda source: relaxation.floats.get(source, source))
    kwargs = {key: value for key, value in node.kwargs.items() if key != "dtype"}
    return relaxation.call(node, target, *args, **kwargs)


# --- casts and comparisons -----------------------------------------------------------------------


def relax_cast(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """Cast a relaxation to no less precise a type than its own, which would round its gradients."""
    source = relaxation.as_float(node.args[0], node)
    if source is None:
        return None
    dtype, source_dtype = (n.meta["val"].dtype for n in (node, *node.all_input_nodes[:1]))
    if dtype == torch.bool != source_dtype:
        return relaxation.call(node, ours.step.default, source, "ne")  # True for what is not zero
    if not is_floating_node(node):
        return source
    if dtype not in ACCUMULATE_IN:  # operations in half precision take no other type
        dtype = torch.promote_types(dtype, source.meta["val"].dtype)
    return relaxation.call(node, aten._to_copy.default, source, dtype=dtype)


def relax_cast_of_floats(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """A cast of floats to integers is a truncation; one to booleans is True for what is not 0."""
    if is_floating_node(node) or node.meta["val"].is_complex():
        return None
    if node.meta["val"].dtype == torch.bool:
        return relaxation.call(node, ours.step.default, node.args[0], "ne")
    return relaxation.call(node, aten.trunc.default, node.args[0])


def relax_comparison(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """U > v is a step of u - v."""
    relation = COMPARISONS[op_packet(node)]
    if is_candidate_check(relaxation, node):
        return relax_candidate_check(relaxation, node, equal=relation == "eq")
    u, v = (relaxation.as_float(value, node) for value in node.args[:2])
    if u is None or v is None:
        return None
    difference = relaxation.call(node, aten.sub.Tensor, u, v)
    return relaxation.call(node, ours.step.default, difference, relation)


def count_passed(relaxation: Relaxation, node: fx.Node, u: Any, boundaries: Any) -> fx.Node | None:
    """Count the constant boundaries that u passes: `bucketize` and `searchsorted`."""
    if not is_floating_node(u) or not is_floating_node(boundaries) or boundaries.meta["varying"]:
        return None
    options = {"right": False, "side": None, **node.kwargs}
    relation = "ge" if options["right"] or options["side"] == "right" else "gt"
    values = relaxation.call(node, aten.unsqueeze.default, u, -1)
    each = relaxation.call(node, aten.unsqueeze.default, boundaries, -2)
    above = relaxation.call(node, aten.sub.Tensor, values, each)
    passed = relaxation.call(node, ours.step.default, above, relation)
    return relaxation.call(node, aten.sum.dim_IntList, passed, [-1])


# --- selection -----------------------------------------------------------------------------------


def relax_selection(
    relaxation: Relaxation, node: fx.Node, condition: Any, a: Any, b: Any
) -> fx.Node | None:
    """Select between two branches by a relaxed condition."""
    parts = [relaxation.as_float(value, node) for value in (condition, a, b)]
    if condition not in relaxation.floats or None in parts:
        return None
    return relaxation.call(node, ours.select.default, *parts)


def relax_where(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """where(c, a, b)."""
    return relax_selection(relaxation, node, *node.args[:3]) if len(node.args) >= 3 else None


def relax_masked_fill(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """masked_fill(x, mask, value)."""
    x, mask, value = node.args
    return relax_selection(relaxation, node, mask, value, x)


# --- logic ---------------------------------------------------------------------------------------

#: ``call(target, *args)`` adds a call to the graph and returns its node.
CallFn = Callable[..., fx.Node]


def logical(formula: Callable[..., fx.Node]) -> RelaxFn:
    """Return the relaxation of a logical operation with this formula on 0/1 floats."""

    def relax(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
        parts = [relaxation.as_float(value, node) for value in node.args]
        if None in parts or node.meta["val"].dtype != torch.bool:
            return None
        return formula(lambda target, *args: relaxation.call(node, target, *args), *parts)

    return relax


def conjunction(call: CallFn, a: fx.Node, b: fx.Node) -> fx.Node:
    """A and b = a b."""
    return call(aten.mul.Tensor, a, b)


def disjunction(call: CallFn, a: fx.Node, b: fx.Node) -> fx.Node:
    """A or b = a + b - a b."""
    return call(aten.sub.Tensor, call(aten.add.Tensor, a, b), call(aten.mul.Tensor, a, b))


def exclusive_or(call: CallFn, a: fx.Node, b: fx.Node) -> fx.Node:
    """A xor b = a + b - 2 a b."""
    total = call(aten.add.Tensor, a, b)
    return call(aten.sub.Tensor, total, call(aten.mul.Tensor, call(aten.mul.Tensor, a, b), 2.0))


def negation(call: CallFn, a: fx.Node) -> fx.Node:
    """Not a = 1 - a."""
    return call(aten.rsub.Scalar, a, 1.0)


def reduction(target: Callable[..., Any]) -> RelaxFn:
    """`any` is a maximum of 0/1 floats, `all` a minimum."""

    def relax(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
        source, *rest = call_args(node)
        dims = rest[0] if rest else []
        dims = [dims] if isinstance(dims, int) else dims
        return relaxation.call(node, target, relaxation.floats[source], dims, *rest[1:])

    return relax


#: For each operation on a relaxed boolean or integer, its floating-point form.
BOOLEAN_USES: dict[Any, RelaxFn] = {
    **dict.fromkeys(CASTS, relax_cast),
    aten.where: relax_where,
    aten.masked_fill: relax_masked_fill,
    **dict.fromkeys((aten.logical_and, aten.bitwise_and, aten.__and__), logical(conjunction)),
    **dict.fromkeys((aten.logical_or, aten.bitwise_or, aten.__or__), logical(disjunction)),
    **dict.fromkeys((aten.logical_xor, aten.bitwise_xor), logical(exclusive_or)),
    **dict.fromkeys((aten.logical_not, aten.bitwise_not), logical(negation)),
    aten.any: reduction(aten.amax.default),
    aten.all: reduction(aten.amin.default),
}
