"""A pass: booleans that depend on the input become 0/1 floats.

A boolean has no gradient, so whatever passes through ``x > 0`` would be lost. Every comparison gets
a floating-point twin, a step of the difference, and so does every cast to integers, a truncation;
logic and integer arithmetic on twins become their floating-point counterparts; ``where`` and
``masked_fill`` become `select` on the twin, and `bucketize` and `searchsorted` count the boundaries
that are passed.
What is looked up by integers with a twin is in :mod:`fxshap.passes.relax_indices`. Masks that do
not depend on the input stay what they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxshap.graph.insertion import insert_function
from fxshap.graph.nodes import CASTS
from fxshap.ops.dtypes import ACCUMULATE_IN
from fxshap.passes import relax_indices as choices
from fxshap.rules.core.registry import find_rule

aten = torch.ops.aten
ours = torch.ops.fxshap


def far_below(dtype: torch.dtype) -> float:
    """Return what stands for -inf where it may or may not be filled in: finite, below any logit.

    The slope of a softmax over such a step is its reciprocal, which must be a normal number, also
    when it is multiplied.
    """
    return max(-1e250 if dtype is torch.float64 else -1e30, torch.finfo(dtype).min / 2)


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


def is_floating(node: Any) -> bool:
    """Say whether an argument is a node that gives one floating-point tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


class Relaxation:
    """The floating-point twins of boolean and integer nodes, built in graph order."""

    def __init__(self, graph: fx.Graph, dtype: torch.dtype) -> None:
        self.graph = graph
        self.dtype = dtype
        self.twin: dict[fx.Node, fx.Node] = {}
        self.hot: dict[fx.Node, fx.Node] = {}  # of indices, over the candidates

    def call(self, like: fx.Node, target: Callable[..., Any], *args: Any, **kw: Any) -> fx.Node:
        """Add a floating-point node with the shape and the origin of `like`."""
        node = self.graph.call_function(target, args, kw)
        floats = [a.meta["val"].dtype for a in node.all_input_nodes if is_floating(a)]
        node.meta = dict(like.meta)
        node.meta["val"] = like.meta["val"].to(kw.get("dtype", floats[0] if floats else self.dtype))
        node.meta["varying"] = any(a.meta.get("varying", False) for a in node.all_input_nodes)
        return node

    def run(
        self, like: fx.Node, function: Callable[..., Any], *inputs: fx.Node, **tracing: bool
    ) -> fx.Node:
        """Add the nodes of a function of tensors."""
        result: fx.Node = insert_function(self.graph, like, function, *inputs, **tracing)
        return result

    def index(self, node: fx.Node, hot: fx.Node) -> fx.Node:
        """Keep the one-hot floats of an index and return its number."""

        def number(ones: Tensor) -> Tensor:
            return (ones * torch.arange(ones.shape[-1], device=ones.device)).sum(-1)

        self.hot[node] = hot
        return self.run(node, number, hot)

    def number(self, value: float, like: fx.Node) -> fx.Node:
        """Add a constant scalar tensor."""
        value = far_below(self.dtype) if value == -math.inf else value
        node = self.graph.call_function(
            aten.full.default, ([], value), {"dtype": self.dtype, "device": like.meta["val"].device}
        )
        node.meta = {"varying": False, "val": like.meta["val"].new_empty([], dtype=self.dtype)}
        return node

    def as_float(self, value: Any, like: fx.Node) -> fx.Node | None:
        """Return a floating-point node for a node or a number; ``None`` if there is none."""
        if not isinstance(value, fx.Node):
            return self.number(float(value), like)
        if value in self.twin:
            return self.twin[value]
        if is_floating(value):
            return value
        if value.meta.get("varying", False):
            return None
        return self.call(value, aten._to_copy.default, value, dtype=self.dtype)


def relax_booleans(graph: fx.Graph, dtype: torch.dtype) -> fx.Graph:
    """Give every boolean that depends on the input a floating-point twin, and use it.

    Parameters
    ----------
    graph : fx.Graph
        A functional ATen graph whose nodes say in ``meta["varying"]`` whether they depend on the
        input. Changed in place.
    dtype : torch.dtype
        Floating-point type of the twins.
    """
    twins = Relaxation(graph, dtype)
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.meta.get("varying", False):
            continue
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        with graph.inserting_before(node.next):
            twin = floating_form(twins, node)
        if twin is None:
            continue
        if is_floating(node):
            node.replace_all_uses_with(twin, delete_user_cb=lambda user, t=twin: user is not t)
        else:
            twins.twin[node] = twin
    graph.eliminate_dead_code()
    return graph


def floating_form(twins: Relaxation, node: fx.Node) -> fx.Node | None:
    """Return the floating-point form of one node, or ``None`` where it needs or has none."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet in COMPARISONS:
        return compare(twins, node, COMPARISONS[packet])
    if packet in CASTS and is_floating(node.args[0]):
        return truncate(twins, node)
    if packet is aten.bucketize:
        return count_passed(twins, node, *node.args[:2])
    if packet is aten.searchsorted and node.kwargs.get("sorter") is None:
        return count_passed(twins, node, node.args[1], node.args[0])
    if choices.gives_index(node):
        return choices.index_of(twins, node)
    if not any(argument in twins.twin for argument in node.all_input_nodes):
        return None
    if choices.is_choice(twins, node):
        return choices.FORMS[packet](twins, node)
    if packet in FORMS:
        return FORMS[packet](twins, node)
    if packet in CASTS:
        return cast(twins, node)
    target: Any = node.target
    rule = find_rule(target)
    if rule is None or not rule.closed or node.target is operator.getitem:
        return None
    args = fx.map_arg(node.args, lambda a: twins.twin.get(a, a))
    kwargs = {key: value for key, value in node.kwargs.items() if key != "dtype"}
    return twins.call(node, target, *args, **kwargs)


def cast(twins: Relaxation, node: fx.Node) -> fx.Node | None:
    """Cast a twin to no narrower a type than its own, which would round its gradients."""
    source = twins.as_float(node.args[0], node)
    if source is None:
        return None
    types = [n.meta["val"].dtype for n in (node, *node.all_input_nodes[:1])]
    if types[0] == torch.bool != types[1]:  # a boolean says what is not zero
        return twins.call(node, ours.step.default, source, "ne")
    if not is_floating(node):
        return source
    dtype = node.meta["val"].dtype
    if dtype not in ACCUMULATE_IN:  # what goes on in half precision takes nothing else
        dtype = torch.promote_types(dtype, source.meta["val"].dtype)
    return twins.call(node, aten._to_copy.default, source, dtype=dtype)


def truncate(twins: Relaxation, node: fx.Node) -> fx.Node | None:
    """Cast to integers is a truncation; a cast to booleans says what is not zero."""
    if is_floating(node) or node.meta["val"].is_complex():
        return None
    if node.meta["val"].dtype == torch.bool:
        return twins.call(node, ours.step.default, node.args[0], "ne")
    return twins.call(node, aten.trunc.default, node.args[0])


def compare(twins: Relaxation, node: fx.Node, relation: str) -> fx.Node | None:
    """U > v is a step of u - v."""
    if choices.is_one_number(twins, node):
        return choices.is_candidate(twins, node, equal=relation == "eq")
    u, v = (twins.as_float(value, node) for value in node.args[:2])
    if u is None or v is None:
        return None
    return twins.call(node, ours.step.default, twins.call(node, aten.sub.Tensor, u, v), relation)


def choose(twins: Relaxation, node: fx.Node, condition: Any, a: Any, b: Any) -> fx.Node | None:
    """Select between two branches by a twin."""
    parts = [twins.as_float(value, node) for value in (condition, a, b)]
    if condition not in twins.twin or None in parts:
        return None
    return twins.call(node, ours.select.default, *parts)


def count_passed(twins: Relaxation, node: fx.Node, u: Any, boundaries: Any) -> fx.Node | None:
    """Count the constant boundaries that are passed: `bucketize` and `searchsorted`."""
    if not all(isinstance(end, fx.Node) and is_floating(end) for end in (u, boundaries)):
        return None
    if boundaries.meta["varying"]:
        return None
    options = {"right": False, "side": None, **node.kwargs}
    right = options["right"] or options["side"] == "right"
    wide = twins.call(node, aten.unsqueeze.default, u, -1)
    each = twins.call(node, aten.unsqueeze.default, boundaries, -2)
    above = twins.call(node, aten.sub.Tensor, wide, each)
    passed = twins.call(node, ours.step.default, above, "ge" if right else "gt")
    return twins.call(node, aten.sum.dim_IntList, passed, [-1])


def where(twins: Relaxation, node: fx.Node) -> fx.Node | None:
    """where(c, a, b)."""
    return choose(twins, node, *node.args[:3]) if len(node.args) >= 3 else None


def masked_fill(twins: Relaxation, node: fx.Node) -> fx.Node | None:
    """masked_fill(x, mask, value)."""
    x, mask, value = node.args
    return choose(twins, node, mask, value, x)


def logic(formula: Callable[..., fx.Node]) -> Callable[[Relaxation, fx.Node], fx.Node | None]:
    """Turn a formula on 0/1 floats into the form of a logical operation."""

    def form(twins: Relaxation, node: fx.Node) -> fx.Node | None:
        parts = [twins.as_float(value, node) for value in node.args]
        if None in parts or node.meta["val"].dtype != torch.bool:
            return None
        return formula(lambda target, *args: twins.call(node, target, *args), *parts)

    return form


Call = Callable[..., fx.Node]


def both(call: Call, a: fx.Node, b: fx.Node) -> fx.Node:
    """A and b = a b."""
    return call(aten.mul.Tensor, a, b)


def either(call: Call, a: fx.Node, b: fx.Node) -> fx.Node:
    """A or b = a + b - a b."""
    return call(aten.sub.Tensor, call(aten.add.Tensor, a, b), call(aten.mul.Tensor, a, b))


def one_of(call: Call, a: fx.Node, b: fx.Node) -> fx.Node:
    """A xor b = a + b - 2 a b."""
    return call(
        aten.sub.Tensor,
        call(aten.add.Tensor, a, b),
        call(aten.mul.Tensor, call(aten.mul.Tensor, a, b), 2.0),
    )


def negation(call: Call, a: fx.Node) -> fx.Node:
    """Not a = 1 - a."""
    return call(aten.rsub.Scalar, a, 1.0)


def reduction(target: Callable[..., Any]) -> Callable[[Relaxation, fx.Node], fx.Node | None]:
    """`any` is a maximum of 0/1 floats, `all` a minimum."""

    def form(twins: Relaxation, node: fx.Node) -> fx.Node | None:
        source, *rest = list[Any](node.args)
        dims = rest[:1] or [[]]
        dims = [[dims[0]] if isinstance(dims[0], int) else dims[0]]
        return twins.call(node, target, twins.twin[source], *dims, *rest[1:])

    return form


FORMS: dict[Any, Callable[[Relaxation, fx.Node], fx.Node | None]] = {
    aten.where: where,
    aten.masked_fill: masked_fill,
    aten.logical_and: logic(both),
    aten.bitwise_and: logic(both),
    aten.__and__: logic(both),
    aten.logical_or: logic(either),
    aten.bitwise_or: logic(either),
    aten.__or__: logic(either),
    aten.logical_xor: logic(one_of),
    aten.bitwise_xor: logic(one_of),
    aten.logical_not: logic(negation),
    aten.bitwise_not: logic(negation),
    aten.any: reduction(aten.amax.default),
    aten.all: reduction(aten.amin.default),
}
