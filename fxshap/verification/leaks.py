"""Which operations leak: the local finite difference of every node, in one walk.

A walk from a reference r to a sample x is exact if every node hands on what it was given: with the
cotangent g of its output and the multipliers m of its inputs, sum(m d) = <g, dy>. What a node
leaves of that is its leak, and the leaks of all nodes sum to what the attributions lack:

    (f(x) - f(r)) - sum(phi) = sum over nodes of (<g, dy> - sum(m d))

since the difference at every edge of the graph but the first and the last counts once with either
sign.
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

#: Leaks that are named, the largest first, and how small beside the largest.
MAX_LEAKS = 10
SMALLEST_SHARE = 0.01

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Leak:
    """What one node of the graph leaves of the finite difference.

    Attributes
    ----------
    name : str
        The user's module and the operation, such as ``layer3.attn.softmax``.
    operation : str
        The operator, such as ``aten.softmax.int``.
    rule : str
        The rule that multiplied; ``linear`` where autograd did.
    line : str
        The user's line that the operation came from; empty if it is not known.
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
    attribute: fx.GraphModule,
    sample: Sequence[Tensor],
    references: Sequence[Tensor],
    output: int,
    scale: float,
) -> list[Leak]:
    """Walk from all references to a sample; return the nodes that leak, the largest leak first.

    Parameters
    ----------
    attribute : fx.GraphModule
        The rewritten graph, ``attribute(ends, *inputs) -> output``, with its weights bound.
    sample, references : sequence of Tensor
        One tensor an input, of shapes (1, ...) and (references, ...).
    output : int
        The column of the output to differentiate.
    scale : float
        What errors are relative to.
    """
    errors = local_errors(attribute, sample, references, output)
    found = sorted(errors.items(), key=lambda item: -size(item[1]))
    worst = size(found[0][1]) if found else 0.0
    return [
        describe(node, error / scale)
        for node, error in found[:MAX_LEAKS]
        if size(error) >= SMALLEST_SHARE * worst > 0
    ]


def size(error: float) -> float:
    """Return how large an error is; NaN is the largest."""
    return math.inf if math.isnan(error) else abs(error)


def local_errors(
    attribute: fx.GraphModule, sample: Sequence[Tensor], references: Sequence[Tensor], output: int
) -> dict[fx.Node, float]:
    """Return <g, dy> - sum(m d) of every operation, the mean over the references.

    Parameters are those of :func:`find_leaks`.
    """
    rows = len(references[0])
    after, before = _Steps(attribute), _Steps(attribute)
    ends, other = Endpoints(), Endpoints()
    after.run(other, *[x.detach().expand(rows, *x.shape[1:]) for x in sample])
    before.run(ends, *[r.detach() for r in references])
    ends.sample = other.reference  # the sample of a walk is what the operations received there
    errors: dict[fx.Node, float] = {}
    grads: dict[fx.Node, Gradients] = {}
    for node in reversed(attribute.graph.nodes):
        if node.op == "output":
            (explained,) = node.all_input_nodes
            unit = torch.zeros_like(before.env[explained])
            unit[:, output] = 1 / rows
            grads[explained] = [unit]
        elif node.op == "call_function" and node in grads:
            grad = grads.pop(node)
            errors[node] = change(grad, after.env[node], before.env[node])
            for source, found in before.steps[node].walk(grad).items():
                errors[node] -= change(found, after.env[source], before.env[source])
                grads[source] = sum_of(grads[source], found) if source in grads else found
    return errors


def describe(node: fx.Node, error: float) -> Leak:
    """Name a node, its operation, its rule and where it came from."""
    rescaled, target = is_rescaled(node), original_operator(node)
    rule = find_rule(target)
    return Leak(
        name=".".join(filter(None, [user_module(node), node.name])),
        operation=str(target),
        rule="linear" if not rescaled else rule.name if rule and rule.multiply else "generic",
        line=line if (line := source_line(node)) != UNKNOWN_LINE else "",
        error=error,
    )


# --- one operation at a time --------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One operation, run on leaves of its own, so that it can be walked back alone."""

    sources: dict[fx.Node, Any]
    output: Any

    def walk(self, grad: Gradients) -> dict[fx.Node, Gradients]:
        """Return the cotangents of the operation's sources for those of its outputs."""
        outputs = pytree.tree_leaves(self.output)
        pairs = [(y, g) for y, g in zip(outputs, grad, strict=True) if g is not None]
        leaves = {source: pytree.tree_leaves(value) for source, value in self.sources.items()}
        wanted = [leaf for values in leaves.values() for leaf in values if follows(leaf)]
        pairs = [(y, g) for y, g in pairs if follows(y)]
        if not pairs or not wanted:
            return {}
        found = torch.autograd.grad(
            [y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True
        )
        grads = iter(found)
        return {
            source: [next(grads) if follows(leaf) else None for leaf in values]
            for source, values in leaves.items()
        }


class _Steps(fx.Interpreter):
    """Runs a graph one operation at a time, and keeps each."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.steps: dict[fx.Node, _Step] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run an operation on leaves in place of what depends on the input."""
        taken = {source: self.env[source] for source in n.all_input_nodes}
        varying = {
            source: pytree.tree_map(leaf_of, value)
            for source, value in taken.items()
            if source.meta.get("varying", False)
        }
        args, kwargs = fx.map_arg((n.args, n.kwargs), {**taken, **varying}.__getitem__)
        with torch.enable_grad():
            output = getattr(self, n.op)(n.target, args, kwargs)
        self.steps[n] = _Step(varying, output)
        return output


def follows(value: Any) -> bool:
    """Say whether autograd follows a value."""
    return isinstance(value, Tensor) and value.requires_grad


def leaf_of(value: Any) -> Any:
    """Return a leaf that shares a tensor's values; anything else is itself."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(differentiable(value))


def change(grad: Gradients, after: Any, before: Any) -> float:
    """Return <g, dy> in float64; where both ends are the same infinity there is no difference."""
    total = 0.0
    leaves = zip(grad, pytree.tree_leaves(after), pytree.tree_leaves(before), strict=True)
    for g, x, r in leaves:
        if g is not None:
            wide = torch.complex128 if g.is_complex() else torch.float64
            g, x, r = (value.detach().to(wide) for value in (g, x, r))
            step = torch.where((x == r) | (g == 0), 0.0, x - r)
            total += float((g.conj() * step).real.sum())
    return total


def sum_of(a: Gradients, b: Gradients) -> Gradients:
    """Add cotangents that reach a node from two of its users."""
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]
