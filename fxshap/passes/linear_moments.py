"""The image of the moments of terms under a linear operation: the mean, or the variance.

The mean of a sum is the sum of the means, and its variance is the sum of the variances if the terms
are independent. So the linear operation itself, without its bias, gives the change of the mean, and
the same operation with squared weights gives the variance.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import call_args, op_packet, size_key

aten = torch.ops.aten


class LinearMoment:
    """A moment of every node, as far as it is known.

    Parameters
    ----------
    graph : fx.Graph
        Gets the nodes that compute the moments.
    power : int
        The power of the weights: 1 for means, 2 for variances.
    zeros_like : dict of Node to Node, optional
        For nodes without this moment, which is 0, nodes of the same shape.

    Attributes
    ----------
    of : dict of Node to Node
        The moment of a node.
    """

    def __init__(
        self, graph: fx.Graph, power: int, zeros_like: dict[fx.Node, fx.Node] | None = None
    ) -> None:
        self.graph = graph
        self.power = power
        self.zeros_like = zeros_like or {}
        self.of: dict[fx.Node, fx.Node] = {}

    def image(self, node: fx.Node, sources: list[fx.Node]) -> fx.Node | None:
        """Return the moment of a node from those of its varying arguments; ``None`` if unknown."""
        known = node.op == "call_function" and any(source in self.of for source in sources)
        formula = FORMULAS.get(op_packet(node)) if known else None
        return formula(self, node, sources) if formula else None

    def call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call that gives a moment of the shape and type of another node."""
        meta = {"val": like.meta["val"], "variance": True}
        return insert_call(self.graph, like, target, args, kwargs, meta=meta)

    def of_argument(self, argument: fx.Node) -> fx.Node:
        """Return the moment of an argument; for a size, the same size of the moment."""
        is_size = argument.op == "call_function" and isinstance(argument.meta["val"], torch.SymInt)
        if argument in self.of or not is_size:
            return self.of.get(argument, argument)
        args = fx.map_arg(argument.args, self.of_argument)
        target: Any = argument.target
        return argument if args == argument.args else self.call(argument, target, *args)

    def of_term(self, term: fx.Node) -> fx.Node:
        """Return the moment of a term, zeros if it has none."""
        known = self.of.get(term)
        like = self.zeros_like.get(term, term)
        return known or self.call(term, aten.zeros_like.default, like)

    def factor(self, factor: Any) -> Any:
        """Return a power of a number or of a constant tensor; ``None`` if it is neither."""
        if isinstance(factor, int | float):
            return factor**self.power
        is_tensor = isinstance(factor, fx.Node) and isinstance(factor.meta["val"], Tensor)
        if not is_tensor or self.power == 1:
            return factor if is_tensor else None
        return self.call(factor, aten.mul.Tensor, factor, factor)


# --- formulas: the moment of a linear operation from those of its arguments ----------------------

#: Takes a node and its varying arguments; returns the node's moment, or ``None`` if unknown.
Formula = Callable[[LinearMoment, fx.Node, list[fx.Node]], fx.Node | None]


def same_operation(moment: LinearMoment, node: fx.Node, sources: list[fx.Node]) -> fx.Node:
    """The same operation on the moments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), moment.of_argument)
    return moment.call(node, node.target, *args, **kwargs)


def concatenation(moment: LinearMoment, node: fx.Node, sources: list[fx.Node]) -> fx.Node:
    """The same operation on the moments, with zeros for constants."""
    parts, *rest = call_args(node)
    return moment.call(node, node.target, [*map(moment.of_term, parts)], *rest, **node.kwargs)


def negation(moment: LinearMoment, node: fx.Node, sources: list[fx.Node]) -> fx.Node:
    """The mean of -a is that of a with the opposite sign; the variance is the same."""
    value = moment.of[sources[0]]
    return value if moment.power == 2 else moment.call(node, aten.neg.default, value)


def addition(moment: LinearMoment, node: fx.Node, sources: list[fx.Node]) -> fx.Node | None:
    """The moment of a + c b is M(a) + c^power M(b); a constant term adds nothing."""
    plain, scaled, *rest = call_args(node)
    factor: Any = node.kwargs.get("alpha", *rest or (1,))
    if op_packet(node) is aten.rsub:
        plain, scaled = scaled, plain
    sign = 1 if op_packet(node) is aten.add else -1
    weight = (sign * factor) ** moment.power
    terms = [term for term in sources if term in moment.of]
    if len(terms) == 2:
        values = moment.of[plain], moment.of[scaled]
        return moment.call(node, aten.add.Tensor, *values, alpha=weight)
    (term,) = terms
    weight = weight if term is scaled else 1
    if not same_shape(term, node):
        return None
    value = moment.of[term]
    return value if weight == 1 else moment.call(node, aten.mul.Scalar, value, weight)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Return True if two tensors have the same shape, without a guard on symbolic sizes."""
    first, second = ([size_key(size) for size in node.meta["val"].shape] for node in (a, b))
    return first == second


def product(moment: LinearMoment, node: fx.Node, sources: list[fx.Node]) -> fx.Node | None:
    """The same operation with a power of the constant factor, and without the bias."""
    first, second, *rest = call_args(node)
    is_quotient = op_packet(node) is aten.div
    if len(sources) > 1 or node.kwargs or (is_quotient and sources[0] is not first):
        return None
    factors = [moment.of.get(arg) or moment.factor(arg) for arg in (first, second)]
    rest = [None, *rest[1:]] if rest else []
    return None if None in factors else moment.call(node, node.target, *factors, *rest)


def matrix_product(moment: LinearMoment, node: fx.Node, sources: list[fx.Node]) -> fx.Node | None:
    """The product of ``addmm`` with a power of the weight, without the bias, which comes first."""
    _, x, weight = call_args(node)
    if node.kwargs or sources != [x]:
        return None
    return moment.call(node, aten.mm.default, moment.of[x], moment.factor(weight))


def average(moment: LinearMoment, node: fx.Node, sources: list[fx.Node]) -> fx.Node | None:
    """The same operation; the variance of a mean of n terms is the mean of theirs over n."""
    mean = same_operation(moment, node, sources)
    if moment.power == 1:
        return mean
    count = averaged_elements(node, sources[0].meta["val"].shape)
    return None if count is None else moment.call(node, aten.mul.Scalar, mean, 1 / count)


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

FORMULAS: dict[Any, Formula] = {
    **dict.fromkeys(MOVES, same_operation),
    aten.cat: concatenation,
    aten.stack: concatenation,
    aten.neg: negation,
    **dict.fromkeys(SUMS, addition),
    **dict.fromkeys(SCALED + PRODUCTS, product),
    aten.addmm: matrix_product,
    **dict.fromkeys(MEANS, average),
}
