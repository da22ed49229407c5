"""A pass that leads the variance of every sum to the activation after it.

Beside each chain of linear operations from one nonlinear operation to the next runs a second one,
of the same operations with squared weights, which makes the variance of a sum of those of its
terms. :mod:`fxshap.rules.smoothed_activations` has the formulas. What the tables here do not know
is taken for a single term of what follows it. That costs nearness alone: attributions add up
however the variances are counted, as long as they are linear in those of the terms.
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
from fxshap.graph.nodes import call_nodes, op_packet, varying_arguments
from fxshap.rules.smoothed_activations import SMOOTHED, activation, finite_change, variance

aten = torch.ops.aten


def propagate_variances(graph: fx.Graph) -> fx.Graph:
    """Let every activation after a sum receive the variance of the sum, in place."""
    variances = VariancePropagation(graph)
    for node in list(graph.nodes):
        if node.op == "output" or not node.meta["varying"] or not gives_reals(node):
            continue
        if op_packet(node) in SMOOTHED and [place for place, _ in varying_arguments(node)] == [0]:
            source, *rest = arguments(node)
            if source in variances.sums:
                node.args = (source, variances.of[source], node.target, *rest)
                node.target = activation
        variances.follow(node)
    graph.eliminate_dead_code()
    return graph


def restore_activations(graph: fx.Graph) -> fx.Graph:
    """Take the variances out of a graph again, in place."""
    for node in call_nodes(graph):
        if node.target is activation:
            source, _, target, *rest = arguments(node)
            node.target = target
            node.args = (source, *rest)
    graph.eliminate_dead_code()
    return graph


def measure_variances(attribute: fx.Graph, taps: Collection[str]) -> fx.Graph:
    """Build ``measure(reference, sample, *inputs) -> variances`` of a rewritten graph.

    It takes the taps of both ends, by name, and the inputs of either, of which it reads the sizes,
    and returns the variances that activations receive, in the order of `taps`.
    """
    graph = fx.Graph()
    reference, sample = graph.placeholder("reference"), graph.placeholder("sample")
    copies: dict[fx.Node, fx.Node] = {}
    for node in attribute.nodes:
        if node.target is rescale_variance:
            (tap,) = arguments(node)[2].values()
            copies[node] = graph.call_function(squared_change, (reference, sample, tap))
        elif node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    named = {node.name: copy for node, copy in copies.items()}
    graph.output(tuple(named[tap] for tap in taps))
    graph.eliminate_dead_code()
    graph.erase_node(named["ends"])
    return graph


def squared_change(reference: Taps, sample: Taps, tap: str) -> Tensor:
    """Return (x - r)^2 of a tap."""
    return finite_change(reference[tap], sample[tap]).square_()


def gives_reals(node: fx.Node) -> bool:
    """Say whether the output of a node, or each of its outputs, is real."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(v, Tensor) and v.is_floating_point() for v in values)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the positional arguments, of any type."""
    return node.args


class VariancePropagation:
    """The variance of every node, and which nodes are sums.

    Parameters
    ----------
    graph : fx.Graph
        Which gets the nodes that compute them.

    Attributes
    ----------
    of : dict of Node to Node
    sums : set of Node
        Nodes with elements that add several terms.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.of: dict[fx.Node, fx.Node] = {}
        self.sums: set[fx.Node] = set()

    def follow(self, node: fx.Node) -> None:
        """Add the variance of a node behind it."""
        sources = [source for _, source in varying_arguments(node)]
        known = node.op == "call_function" and all(source in self.of for source in sources)
        form = FORMS.get(op_packet(node)) if known else None
        with self.graph.inserting_before(node.next):
            found = form(self, node, sources) if form else None
            if found is not None:
                self.of[node] = found
                if adds(node, sources) or not self.sums.isdisjoint(sources):
                    self.sums.add(node)
            elif isinstance(node.meta["val"], Tensor):
                self.of[node] = self.call(node, variance, node)

    def call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Call a function that gives a tensor of the shape and type of another node."""
        found = self.graph.call_function(target, args, kwargs)
        found.meta = {**like.meta, "variance": True}
        return found

    def now(self, argument: fx.Node) -> fx.Node:
        """Return the variance of an argument, and for a size that of a variance."""
        is_size = argument.op == "call_function" and isinstance(argument.meta["val"], torch.SymInt)
        if argument in self.of or not is_size:
            return self.of.get(argument, argument)
        args = fx.map_arg(argument.args, self.now)
        target: Any = argument.target
        return argument if args == argument.args else self.call(argument, target, *args)

    def squared(self, factor: Any) -> Any:
        """Return the square of a number or of a constant tensor; ``None`` if it is neither."""
        if isinstance(factor, int | float):
            return factor * factor
        tensor = isinstance(factor, fx.Node) and isinstance(factor.meta["val"], Tensor)
        return self.call(factor, aten.mul.Tensor, factor, factor) if tensor else None


# --- the forms: how a linear operation makes its variance of those of its arguments --------------

#: A form returns the variance of a node, or ``None`` if it is not known.
Form = Callable[[VariancePropagation, fx.Node, list[fx.Node]], fx.Node | None]


def moved(variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]) -> fx.Node:
    """The same operation."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), variances.now)
    return variances.call(node, node.target, *args, **kwargs)


def joined(variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]) -> fx.Node:
    """The same operation, where what is constant has no variance."""
    parts, *rest = arguments(node)
    found = [
        variances.of.get(part) or variances.call(part, aten.zeros_like.default, part)
        for part in parts
    ]
    return variances.call(node, node.target, found, *rest, **node.kwargs)


def signed(variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]) -> fx.Node:
    """That of the argument."""
    return variances.of[sources[0]]


def summed(variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]) -> fx.Node | None:
    """The sum of the variances of two terms, of which one has a factor."""
    plain, scaled, *rest = arguments(node)
    factor: Any = node.kwargs.get("alpha", *rest or (1,))
    if op_packet(node) is aten.rsub:
        plain, scaled = scaled, plain
    if len(sources) == 2:
        terms = variances.of[plain], variances.of[scaled]
        return variances.call(node, aten.add.Tensor, *terms, alpha=factor * factor)
    (term,) = sources
    same_shape = str(term.meta["val"].shape) == str(node.meta["val"].shape)
    return variances.of[term] if same_shape and factor == 1 else None


def product(
    variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]
) -> fx.Node | None:
    """The same operation with the square of the constant factor, and without the bias."""
    first, second, *rest = arguments(node)
    quotient = op_packet(node) is aten.div
    if len(sources) > 1 or node.kwargs or (quotient and sources[0] is not first):
        return None
    factors = [variances.of.get(arg) or variances.squared(arg) for arg in (first, second)]
    rest = [None, *rest[1:]] if rest else []
    return None if None in factors else variances.call(node, node.target, *factors, *rest)


def matrix_product(
    variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]
) -> fx.Node | None:
    """That of ``addmm``, whose bias comes first."""
    _, x, weight = arguments(node)
    if node.kwargs or sources != [x]:
        return None
    return variances.call(node, aten.mm.default, variances.of[x], variances.squared(weight))


def mean(variances: VariancePropagation, node: fx.Node, sources: list[fx.Node]) -> fx.Node | None:
    """The mean of n variances over n."""
    count = averaged(node, sources[0].meta["val"].shape)
    same = moved(variances, node, sources)
    return None if count is None else variances.call(node, aten.mul.Scalar, same, 1 / count)


def averaged(node: fx.Node, shape: torch.Size) -> int | None:
    """Return of how many elements a mean is; ``None`` if that depends on the batch."""
    args, name = arguments(node), op_packet(node).__name__
    if name == "mean":
        sizes = [shape[dim] for dim in (args[1] if len(args) > 1 else range(len(shape)))]
    elif name.startswith("adaptive"):
        given = node.meta["val"].shape
        spatial = range(-int(name[-2]), 0)  # adaptive_avg_pool2d
        sizes = [max(shape[dim] // given[dim], 1) for dim in spatial]
    else:
        window = [args[1]] if isinstance(args[1], int) else list(args[1])
        sizes = window * (int(name[-2]) // len(window))
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


#: Operations that move numbers, or add them, and nothing else.
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
MEANS = (
    aten.mean, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d,
)  # fmt: skip

FORMS: dict[Any, Form] = {
    **dict.fromkeys(MOVES, moved),
    aten.cat: joined,
    aten.stack: joined,
    aten.neg: signed,
    **dict.fromkeys(SUMS, summed),
    **dict.fromkeys(SCALED + PRODUCTS, product),
    aten.addmm: matrix_product,
    **dict.fromkeys(MEANS, mean),
}
#: What adds elements of one argument.
ADDING = (*PRODUCTS, aten.addmm, *MEANS, aten.sum)


def adds(node: fx.Node, sources: list[fx.Node]) -> bool:
    """Say whether an operation adds terms that vary."""
    return op_packet(node) in ADDING or (op_packet(node) in SUMS and len(sources) > 1)
