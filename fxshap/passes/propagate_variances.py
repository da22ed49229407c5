"""Propagate the variance of every sum, and the shift of its mean, to the activation after it.

For each chain of linear operations from one nonlinear operation to the next, a second chain of the
same operations with squared weights is added. It computes the variance of a sum from the variances
of its terms. A third chain with the weights themselves computes how far the mean of a sum over the
coalitions is from the straight line between the endpoints, from the shifts of the activations
before. :mod:`fxshap.rules.smoothed_activations` has the formulas. An operation that
:mod:`fxshap.passes.linear_moments` does not list is counted as a single term of the sum after it,
without a shift. This only makes the values less accurate: attributions add up for any variances
that are linear in those of the terms, and for any shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from fxshap.autograd.rescale import RESCALES_OF_SUMS, rescale_variance
from fxshap.autograd.tape import Taps
from fxshap.graph.nodes import call_args, call_nodes, op_packet, varying_arguments
from fxshap.ops.dtypes import is_floating
from fxshap.ops.recurrent import OPERATORS
from fxshap.passes.context import Context
from fxshap.passes.linear_moments import MEANS, PRODUCTS, SUMS, LinearMoment
from fxshap.rules.smoothed_activations import (
    SMOOTHED,
    activation,
    finite_change,
    mean_shift,
    shift_between,
    variance,
)
from fxshap.rules.smoothed_logsumexp import OF_LOGITS, of_logits
from fxshap.rules.smoothed_maxima import MAXIMA, maximum

aten = torch.ops.aten

#: Which function takes the place of an operator, or of an overload, after a sum.
SMOOTHED_BY: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(SMOOTHED, activation),
    **dict.fromkeys(MAXIMA, maximum),
    **dict.fromkeys(OF_LOGITS, of_logits),
}
#: Operators with rules that compute the variances of their own sums.
RECURRENT = frozenset(OPERATORS.values())


def propagate_variances(graph: fx.Graph, context: Context) -> fx.Graph:
    """Make every activation after a sum receive the variance of the sum, in place."""
    if not context.variances:
        return graph
    moments = MomentPropagation(graph)
    for node in list(graph.nodes):
        if node.op == "output" or not node.meta["varying"]:
            continue
        positions = [position for position, _ in varying_arguments(node)]
        smoothed = SMOOTHED_BY.get(node.target) or SMOOTHED_BY.get(op_packet(node))
        if smoothed is not None and positions == [0]:
            source, *rest = call_args(node)
            dependent = smoothed is maximum and source in moments.joined
            if source in moments.sums and not dependent:
                of_source = moments.variances.of[source], moments.shifts.of.get(source)
                node.args = (source, *of_source, node.target, *rest)
                node.meta["op"], node.target = node.target, smoothed
        if not has_real_outputs(node):
            continue
        if node.target in RECURRENT and not is_smoothed(node):
            node.kwargs = {**node.kwargs, "smoothed": True}
        moments.propagate(node)
    graph.eliminate_dead_code()
    return graph


def is_smoothed(node: fx.Node) -> bool:
    """Return True if the call of a recurrent operator has the argument ``smoothed`` by position."""
    overload: Any = node.target
    names = [argument.name for argument in overload._schema.arguments]
    return len(node.args) > names.index("smoothed")


def remove_variances(graph: fx.Graph) -> fx.Graph:
    """Undo :func:`propagate_variances`, in place."""
    for node in call_nodes(graph):
        if node.target in SMOOTHED_BY.values():
            source, _, _, target, *rest = call_args(node)
            node.target, node.args = target, (source, *rest)
            del node.meta["op"]
    graph.eliminate_dead_code()
    return graph


def build_variance_graph(rescaled: fx.Graph, taps: Collection[str]) -> fx.Graph:
    """Build ``variance_graph(reference, sample, *inputs) -> variances`` from the rescaled graph.

    It takes the taps of both endpoints, by name, and the inputs of either, of which it reads the
    sizes. It returns the variances that activations receive, in the order of `taps`.
    """
    graph = fx.Graph()
    reference, sample = graph.placeholder("reference"), graph.placeholder("sample")
    copies: dict[fx.Node, fx.Node] = {}
    for node in rescaled.nodes:
        if node.target is rescale_variance:
            (tap,) = call_args(node)[2].values()
            copies[node] = graph.call_function(squared_change, (reference, sample, tap))
        elif node.target is mean_shift:
            source, *rest = call_args(node)
            args = fx.map_arg(tuple(rest), copies.__getitem__)
            copies[node] = graph.call_function(
                shift_of_taps, (reference, sample, source.name, *args), node.kwargs
            )
        elif node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    by_name = {node.name: copy for node, copy in copies.items()}
    graph.output(tuple(by_name[tap] for tap in taps))
    graph.eliminate_dead_code()
    graph.erase_node(by_name["endpoints"])
    return graph


def squared_change(reference: Taps, sample: Taps, tap: str) -> Tensor:
    """Return (x - r)^2 of a tap."""
    return finite_change(reference[tap], sample[tap]).square_()


def shift_of_taps(reference: Taps, sample: Taps, tap: str, *args: Any, **kwargs: Any) -> Tensor:
    """Return the shift of the mean of an activation between two endpoints."""
    return shift_between(reference[tap], sample[tap], *args, **kwargs)


def without_shifts(rescaled: fx.Graph) -> fx.Graph:
    """Give activations their variance in place of the shift of the mean, in place.

    On a tape both are 0, and there is no multiplier of the shift.
    """
    for node in call_nodes(rescaled):
        if node.target in RESCALES_OF_SUMS:
            *before, variance_node, shift = node.args[:7]
            if shift is not None:
                node.args = (*before, variance_node, variance_node, *node.args[7:])
    rescaled.eliminate_dead_code()
    return rescaled


def has_real_outputs(node: fx.Node) -> bool:
    """Return True if the output of a node, or each of its outputs, is real."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return all(map(is_floating, values))


class MomentPropagation:
    """The moments of every node, and which nodes are sums.

    Parameters
    ----------
    graph : fx.Graph
        Gets the nodes that compute the moments.

    Attributes
    ----------
    variances, shifts : LinearMoment
        The variance of every node, and the shift of its mean, if it has one.
    sums : set of Node
        Nodes with elements that add several terms.
    joined : set of Node
        Those that add two computed tensors, as a residual layer does. Their terms often depend on
        each other: in such sums the max game of :mod:`fxshap.rules.maximum` is nearer.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.variances = LinearMoment(graph, 2)
        self.shifts = LinearMoment(graph, 1, zeros_like=self.variances.of)
        self.sums: set[fx.Node] = set()
        self.joined: set[fx.Node] = set()

    def propagate(self, node: fx.Node) -> None:
        """Add the moments of a node after it."""
        sources = [source for _, source in varying_arguments(node)]
        known = all(source in self.variances.of for source in sources)
        with self.graph.inserting_before(node.next):
            result = self.variances.image(node, sources) if known else None
            if result is not None:
                self.variances.of[node] = result
                if shift := self.shifts.image(node, sources):
                    self.shifts.of[node] = shift
                if adds_terms(node, sources) or not self.sums.isdisjoint(sources):
                    self.sums.add(node)
                if joins_tensors(node, sources) or not self.joined.isdisjoint(sources):
                    self.joined.add(node)
            elif isinstance(node.meta["val"], Tensor):
                self.variances.of[node] = self.variances.call(node, variance, node)
                if node.target is activation:
                    shift = self.shifts.call(node, mean_shift, *node.args, **node.kwargs)
                    self.shifts.of[node] = shift


#: Operations that add elements of one argument.
ADDING = (*PRODUCTS, aten.addmm, *MEANS, aten.sum)


def adds_terms(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Return True if an operation adds terms that vary."""
    return op_packet(node) in ADDING or joins_tensors(node, sources)


def joins_tensors(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Return True if an operation adds two tensors that vary."""
    return op_packet(node) in SUMS and len(sources) > 1
