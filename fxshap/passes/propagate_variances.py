"""Propagate the variance of every sum to the activation after it.

For each chain of linear operations from one nonlinear operation to the next, a second chain of the
same operations with squared weights is added. It computes the variance of a sum from the variances
of its terms. :mod:`fxshap.rules.smoothed_activations` has the formulas. An operation that the
tables here do not list is counted as a single term of the sum after it. This only makes the values
less accurate: attributions add up for any variances that are linear in those of the terms.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from fxshap.autograd.rescale import rescale_variance
from fxshap.autograd.tape import Taps
from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import (
    call_args,
    call_nodes,
    op_packet,
    size_key,
    varying_arguments,
)
from fxshap.ops.dtypes import is_floating
from fxshap.ops.recurrent import OPERATORS
from fxshap.passes.context import Context
from fxshap.rules.smoothed_activations import SMOOTHED, activation, finite_change, variance
from fxshap.rules.smoothed_maxima import MAXIMA, maximum

aten = torch.ops.aten

#: Which function takes the place of an operator, or of an overload, after a sum.
SMOOTHED_BY: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(SMOOTHED, activation),
    **dict.fromkeys(MAXIMA, maximum),
}
#: Operators with rules that compute the variances of their own sums.
RECURRENT = frozenset(OPERATORS.values())


def propagate_variances(graph: fx.Graph, context: Context) -> fx.Graph:
    """Make every activation after a sum receive the variance of the sum, in place."""
    if not context.variances:
        return graph
    variances = VariancePropagation(graph)
    for node in list(graph.nodes):
        if node.op == "output" or not node.meta["varying"]:
            continue
        positions = [position for position, _ in varying_arguments(node)]
        smoothed = SMOOTHED_BY.get(node.target) or SMOOTHED_BY.get(op_packet(node))
        if smoothed is not None and positions == [0]:
            source, *rest = call_args(node)
            dependent = smoothed is maximum and source in variances.joined
            if source in variances.sums and not dependent:
                node.args = (source, variances.of[source], node.target, *rest)
                node.meta["op"], node.target = node.target, smoothed
        if not has_real_outputs(node):
            continue
        if node.target in RECURRENT and not is_smoothed(node):
            node.kwargs = {**node.kwargs, "smoothed": True}
        variances.propagate(node)
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
            source, _, target, *rest = call_args(node)
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


def has_real_outputs(node: fx.Node) -> bool:
    """Return True if the output of a node, or each of its outputs, is real."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return all(map(is_floating, values))


class VariancePropagation:
    """The variance of every node, and which nodes are sums.

    Parameters
    ----------
    graph : fx.Graph
        Gets the nodes that compute the variances.

    Attributes
    ----------
    of : dict of Node to Node
        The variance of a node.
    sums : set of Node
        Nodes with elements that add several terms.
    joined : set of Node
        Those that add two computed tensors, as a residual layer does. Their terms often depend on
        each other: in such sums the max game of :mod:`fxshap.rules.maximum` is nearer.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.of: dict[fx.Node, fx.Node] = {}
        self.sums: set[fx.Node] = set()
        self.joined: set[fx.Node] = set()

    def propagate(self, node: fx.Node) -> None:
        """Add the variance of a node after it."""
        sources = [source for _, source in varying_arguments(node)]
        known = node.op == "call_function" and all(source in self.of for source in sources)
        formula = FORMULAS.get(op_packet(node)) if known else None
        with self.graph.inserting_before(node.next):
            result = formula(self, node, sources) if formula else None
            if result is not None:
                self.of[node] = result
                if adds_terms(node, sources) or not self.sums.isdisjoint(sources):
                    self.sums.add(node)
                if joins_tensors(node, sources) or not self.joined.isdisjoint(sources):
                    self.joined.add(node)
            elif isinstance(node.meta["val"], Tensor):
                self.of[node] = self.call(node, variance, node)

    def call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call that gives a variance of the shape and type of another node."""
        meta = {"val": like.meta["val"], "variance": True}
        return insert_call(self.graph, like, target, args, kwargs, meta=meta)

    def of_argument(self, argument: fx.Node) -> fx.Node:
        """Return the variance of an argument; for a size, the same size of the variance."""
        is_size = argument.op == "call_function" and isinstance(argument.meta["val"], torch.SymInt)
        if argument in self.of or not is_size:
            return self.of.get(argument, argument)
        args = fx.map_arg(argument.args, self.of_argument)
        target: Any = argument.target
        return argument if args == argument.args else self.call(argument, target, *args)

    def squared(self, factor: Any) -> Any:
        """Return the square of a number or of a constant tensor; ``None`` if it is neither."""
        if isinstance(factor, int | float):
            return factor * factor
        is_tensor = isinstance(factor, fx.Node) and isinstance(factor.meta["val"], Tensor)
        return self.call(factor, aten.mul.Tensor, factor, factor) if is_tensor else None


# --- formulas: the variance of a linear operation from the variances of its arguments ------------

#: Takes a node and its varying arguments; returns the node's variance, or ``None`` if unknown.
VarianceFormula = Callable[[VariancePropagation, fx.Node, list[fx.Node]], fx.Node | None]


def same_operation(
    variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]
) -> fx.Node:
    """The same operation on the variances."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), variances.of_argument)
    return variances.call(node, node.target, *args, **kwargs)


def concatenation(variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]) -> fx.Node:
    """The same operation on the variances, with zeros for constants."""
    parts, *rest = call_args(node)
    terms = [
        variances.of.get(part) or variances.call(part, aten.zeros_like.default, part)
        for part in parts
    ]
    return variances.call(node, node.target, terms, *rest, **node.kwargs)


def negation(variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]) -> fx.Node:
    """The variance of the argument."""
    return variances.of[sources[0]]


def addition(
    variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]
) -> fx.Node | None:
    """The variance of a + c b is Var(a) + c^2 Var(b); a constant term adds nothing."""
    plain, scaled, *rest = call_args(node)
    factor: Any = node.kwargs.get("alpha", *rest or (1,))
    if op_packet(node) is aten.rsub:
        plain, scaled = scaled, plain
    if len(sources) == 2:
        terms = variances.of[plain], variances.of[scaled]
        return variances.call(node, aten.add.Tensor, *terms, alpha=factor * factor)
    (term,) = sources
    return variances.of[term] if same_shape(term, node) and factor == 1 else None


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Return True if two tensors have the same shape, without a guard on symbolic sizes."""
    first, second = ([size_key(size) for size in node.meta["val"].shape] for node in (a, b))
    return first == second


def product(
    variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]
) -> fx.Node | None:
    """The same operation with the square of the constant factor, and without the bias."""
    first, second, *rest = call_args(node)
    is_quotient = op_packet(node) is aten.div
    if len(sources) > 1 or node.kwargs or (is_quotient and sources[0] is not first):
        return None
    factors = [variances.of.get(arg) or variances.squared(arg) for arg in (first, second)]
    rest = [None, *rest[1:]] if rest else []
    return None if None in factors else variances.call(node, node.target, *factors, *rest)


def matrix_product(
    variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]
) -> fx.Node | None:
    """The product of ``addmm`` with the squared weight, without the bias, which comes first."""
    _, x, weight = call_args(node)
    if node.kwargs or sources != [x]:
        return None
    return variances.call(node, aten.mm.default, variances.of[x], variances.squared(weight))


def average(
    variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]
) -> fx.Node | None:
    """The variance of a mean of n terms is the mean of their variances over n."""
    count = averaged_elements(node, sources[0].meta["val"].shape)
    mean = same_operation(variances, node, sources)
    return None if count is None else variances.call(node, aten.mul.Scalar, mean, 1 / count)


def averaged_elements(node: fx.Node, shape: torch.Size) -> int | None:
    """Return the number of elements in a mean; ``None`` if it depends on the batch."""
    packet, args = op_packet(node), call_args(node)
    if packet is aten.mean:
        sizes = [shape[dim] for dim in (args[1] if len(args) > 1 else range(len(shape)))]
    elif packet in ADAPTIVE_POOLS:
        pooled = node.meta["val"].shape
        sizes = [max(shape[dim] // pooled[dim], 1) for dim in range(-ADAPTIVE_POOLS[packet], 0)]
    else:
        window = [args[1]] if isinstance(args[1], int) else list(args[1])
        sizes = window * (AVERAGE_POOLS[packet] // len(window))  # one number is for all dimensions
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


#: Operations that only move or add elements.
MOVES = (
    operator.getitem, aten.reshape, aten.permute, aten.transpose, aten.t, aten.mT, aten.numpy_T,
    aten.expand, aten.squeeze, aten.unsqueeze, aten.select, aten.slice, aten.narrow, aten.split,
    aten.split_with_sizes, aten.chunk, aten.unbind, aten.unflatten, aten.flatten, aten.movedim,
    aten.diagonal, aten.flip, aten.roll, aten.repeat, aten.repeat_interleave, aten.tril, aten.triu,
    aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle, aten.to, aten._to_copy,
    aten.sum,
)  # fmt: skip
SCALED = (aten.mul, aten.div)
PRODUCTS = (
    aten.mm, aten.bmm, aten.matmul, aten.linear, aten.conv1d, aten.conv2d, aten.conv3d,
    aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
)  # fmt: skip
SUMS = (aten.add, aten.sub, aten.rsub)
#: Average pooling, and its number of dimensions.
AVERAGE_POOLS = {aten.avg_pool1d: 1, aten.avg_pool2d: 2, aten.avg_pool3d: 3}
ADAPTIVE_POOLS = {
    aten.adaptive_avg_pool1d: 1, aten.adaptive_avg_pool2d: 2, aten.adaptive_avg_pool3d: 3,
}  # fmt: skip
MEANS = (aten.mean, *AVERAGE_POOLS, *ADAPTIVE_POOLS)

FORMULAS: dict[Any, VarianceFormula] = {
    **dict.fromkeys(MOVES, same_operation),
    aten.cat: concatenation,
    aten.stack: concatenation,
    aten.neg: negation,
    **dict.fromkeys(SUMS, addition),
    **dict.fromkeys(SCALED + PRODUCTS, product),
    aten.addmm: matrix_product,
    **dict.fromkeys(MEANS, average),
}
#: Operations that add elements of one argument.
ADDING = (*PRODUCTS, aten.addmm, *MEANS, aten.sum)


def adds_terms(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Return True if an operation adds terms that vary."""
    return op_packet(node) in ADDING or joins_tensors(node, sources)


def joins_tensors(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Return True if an operation adds two tensors that vary."""
    return op_packet(node) in SUMS and len(sources) > 1
