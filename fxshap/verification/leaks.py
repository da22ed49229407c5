"""Find the operations that leak: the local finite difference of every node, in one backward pass.

A backward pass from a reference r to a sample x is exact if every node passes on all that it
receives: with the cotangent g of its output and the multipliers m of its inputs,
sum(m d) = <g, dy>. The difference of the two is the leak of the node, and the leaks of all nodes
sum to the additivity error of the attributions:

    (f(x) - f(r)) - sum(phi) = sum over nodes of (<g, dy> - sum(m d))

because the difference at every edge of the graph, except the first and the last, counts once with
each sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxshap.autograd.rescale import Endpoints
from fxshap.graph.provenance import UNKNOWN_LINE, source_line, user_module
from fxshap.ops.dtypes import differentiable
from fxshap.passes.insert_rescale import is_rescaled, original_operator
from fxshap.rules.core.registry import find_rule

#: The most leaks to return, and the smallest one relative to the largest.
MAX_LEAKS = 10
SMALLEST_SHARE = 0.01

#: One cotangent for each output of a node; ``None`` where no gradient arrives.
Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Leak:
    """The part of the finite difference that one node of the graph loses.

    Attributes
    ----------
    name : str
        The user's module and the operation, such as ``layer3.attn.softmax``.
    operation : str
        The operator, such as ``aten.softmax.int``.
    rule : str
        The rule that computed the multiplier; ``linear`` if autograd did.
    line : str
        The user's line that the operation came from; empty if it is unknown.
    error : float
        The mean of <g, dy> - sum(m d) over the references, relative to the largest output.
    """

    name: str
    operation: str
    rule: str
    line: str
    error: float

    def __str__(self) -> str:
        return f"{self.name}: error {abs(self.error):.0e}"


def find_leaks(
    rescaled_graph: fx.GraphModule,
    sample: Sequence[Tensor],
    references: Sequence[Tensor],
    output: int,
    scale: float,
) -> list[Leak]:
    """Return the nodes that leak between all references and a sample, the largest leak first.

    Parameters
    ----------
    rescaled_graph : fx.GraphModule
        The rewritten graph, ``rescaled_graph(endpoints, *inputs) -> output``, with its weights
        bound.
    sample, references : sequence of Tensor
        One tensor for each input, of shapes (1, ...) and (references, ...).
    output : int
        The column of the output to differentiate.
    scale : float
        The number that errors are divided by.
    """
    errors = local_errors(rescaled_graph, sample, references, output)
    ordered = sorted(errors.items(), key=lambda item: -magnitude(item[1]))
    worst = magnitude(ordered[0][1]) if ordered else 0.0
    return [
        make_leak(node, error / scale)
        for node, error in ordered[:MAX_LEAKS]
        if magnitude(error) >= SMALLEST_SHARE * worst > 0
    ]


def magnitude(error: float) -> float:
    """Return the absolute value of an error; NaN counts as infinite."""
    return math.inf if math.isnan(error) else abs(error)


def local_errors(
    rescaled_graph: fx.GraphModule,
    sample: Sequence[Tensor],
    references: Sequence[Tensor],
    output: int,
) -> dict[fx.Node, float]:
    """Return <g, dy> - sum(m d) of every operation, the mean over the references.

    Parameters are those of :func:`find_leaks`.
    """
    rows = len(references[0])
    at_sample, at_reference = NodeByNode(rescaled_graph), NodeByNode(rescaled_graph)
    endpoints, sample_endpoints = Endpoints(), Endpoints()
    at_sample.run(sample_endpoints, *[x.detach().expand(rows, *x.shape[1:]) for x in sample])
    at_reference.run(endpoints, *[r.detach() for r in references])
    # A run records the inputs of all operations as its reference.
    endpoints.sample = sample_endpoints.reference
    errors: dict[fx.Node, float] = {}
    grads: dict[fx.Node, Gradients] = {}
    for node in reversed(rescaled_graph.graph.nodes):
        if node.op == "output":
            (explained,) = node.all_input_nodes
            unit = torch.zeros_like(at_reference.env[explained])
            unit[:, output] = 1 / rows
            grads[explained] = [unit]
        elif node.op == "call_function" and node in grads:
            grad = grads.pop(node)
            errors[node] = inner_product(grad, at_sample.env[node], at_reference.env[node])
            for source, cotangents in at_reference.executions[node].backward(grad).items():
                errors[node] -= inner_product(
                    cotangents, at_sample.env[source], at_reference.env[source]
                )
                earlier = grads.get(source)
                grads[source] = cotangents if earlier is None else add_grads(earlier, cotangents)
    return errors


def make_leak(node: fx.Node, error: float) -> Leak:
    """Return the leak of a node, with its operation, its rule and the user's line."""
    target = original_operator(node)
    line = source_line(node)
    return Leak(
        name=".".join(filter(None, [user_module(node), node.name])),
        operation=str(target),
        rule=rule_name(target) if is_rescaled(node) else "linear",
        line="" if line == UNKNOWN_LINE else line,
        error=error,
    )


def rule_name(target: Any) -> str:
    """Return the name of the rule of an operator; ``generic`` if it has none of its own."""
    rule = find_rule(target)
    return rule.name if rule and rule.backward else "generic"


# --- one operation at a time --------------------------------------------------------------------


@dataclass(frozen=True)
class Execution:
    """One executed operation, with its own autograd leaves as inputs.

    Attributes
    ----------
    sources : dict of fx.Node to Any
        The leaves, or nested tuples of leaves, by the node that they replace the value of.
    output : Any
        The result, one tensor or several.
    """

    sources: dict[fx.Node, Any]
    output: Any

    def backward(self, grad: Gradients) -> dict[fx.Node, Gradients]:
        """Return the cotangents of the operation's sources for those of its outputs."""
        outputs = [
            (y, g)
            for y, g in zip(pytree.tree_leaves(self.output), grad, strict=True)
            if g is not None and requires_grad(y)
        ]
        leaves = {source: pytree.tree_leaves(value) for source, value in self.sources.items()}
        wanted = [leaf for values in leaves.values() for leaf in values if requires_grad(leaf)]
        if not outputs or not wanted:
            return {}
        grads = iter(
            torch.autograd.grad(
                [y for y, _ in outputs], wanted, [g for _, g in outputs], allow_unused=True
            )
        )
        return {
            source: [next(grads) if requires_grad(leaf) else None for leaf in values]
            for source, values in leaves.items()
        }


class NodeByNode(fx.Interpreter):
    """An interpreter that records every operation of a graph in an autograd graph of its own.

    Attributes
    ----------
    executions : dict of fx.Node to Execution
        The executed operations, by node.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.executions: dict[fx.Node, Execution] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run an operation on new leaves instead of the values that depend on the input."""
        values = {source: self.env[source] for source in n.all_input_nodes}
        leaves = {
            source: pytree.tree_map(as_leaf, value)
            for source, value in values.items()
            if source.meta.get("varying", False)
        }
        args, kwargs = fx.map_arg((n.args, n.kwargs), {**values, **leaves}.__getitem__)
        with torch.enable_grad():
            output = getattr(self, n.op)(n.target, args, kwargs)
        self.executions[n] = Execution(leaves, output)
        return output


def requires_grad(value: Any) -> bool:
    """Return True if a value is a tensor that autograd tracks."""
    return isinstance(value, Tensor) and value.requires_grad


def as_leaf(value: Any) -> Any:
    """Return an autograd leaf with the values of a tensor; return anything else unchanged."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(differentiable(value))


def inner_product(grad: Gradients, at_sample: Any, at_reference: Any) -> float:
    """Return <g, y_x - y_r> in float64.

    If both endpoints are the same infinity, their difference is 0, not NaN.
    """
    total = 0.0
    leaves = zip(grad, pytree.tree_leaves(at_sample), pytree.tree_leaves(at_reference), strict=True)
    for g, x, r in leaves:
        if g is not None:
            dtype = torch.complex128 if g.is_complex() else torch.float64
            g, x, r = (value.detach().to(dtype) for value in (g, x, r))
            difference = torch.where((x == r) | (g == 0), 0.0, x - r)
            total += float((g.conj() * difference).real.sum())
    return total


def add_grads(a: Gradients, b: Gradients) -> Gradients:
    """Return the sum of the cotangents that a node receives from two of its users."""
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]
