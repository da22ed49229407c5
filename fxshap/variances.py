"""A pass that leads the variance of every sum to the activation after it.

Beside each chain of linear operations from one nonlinear operation to the next runs a second one,
of the same operations with squared weights, which makes the variance of a sum of those of its
terms. :mod:`fxshap.rules.variances` has the formulas. What the tables here do not know is taken for
a single term of what follows it; that costs nearness alone, for any way to count adds up.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from fxshap.nodes import calls, packet, varying_arguments
from fxshap.rescale import rescale_variance
from fxshap.rules.variances import SMOOTHED, activation, variance

aten = torch.ops.aten

#: Operations that move numbers, or add them: they do the same to the variances.
MOVES = frozenset(
    {
        operator.getitem, aten.reshape, aten.permute, aten.transpose, aten.t, aten.expand,
        aten.squeeze, aten.unsqueeze, aten.select, aten.slice, aten.split, aten.split_with_sizes,
        aten.chunk, aten.unbind, aten.unflatten, aten.flatten, aten.movedim, aten.flip, aten.roll,
        aten.repeat, aten.to, aten._to_copy, aten.sum,
    }
)  # fmt: skip
#: Operations that put tensors together.
JOINS = frozenset({aten.cat, aten.stack})
#: Products with a constant factor, which is squared, and perhaps a bias, which goes.
PRODUCTS = frozenset(
    {
        aten.mul, aten.div, aten.mm, aten.bmm, aten.matmul, aten.linear, aten.conv1d, aten.conv2d,
        aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
    }
)  # fmt: skip
BIAS = 2
#: Means over some of the elements.
MEANS = frozenset(
    {
        aten.mean, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d,
        aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d,
    }
)  # fmt: skip


def lead_variances(graph: fx.Graph) -> fx.Graph:
    """Let every activation after a sum have the variance of the sum, in place."""
    variances = _Variances(graph)
    for node in list(graph.nodes):
        if not gives_reals(node) or not node.meta["varying"]:
            continue
        places = [place for place, _ in varying_arguments(node)] if node.op != "placeholder" else []
        if packet(node) in SMOOTHED and places == [0] and node.args[0] in variances.sums:
            source = node.args[0]
            node.args = (source, variances.of[source], node.target, *node.args[1:])
            node.target = activation
        variances.follow(node)
    graph.eliminate_dead_code()
    return graph


def gives_reals(node: fx.Node) -> bool:
    """Say whether the output of a node, or each of its outputs, is real."""
    values = node.meta.get("val")
    values = values if isinstance(values, list | tuple) else [values]
    return all(isinstance(v, Tensor) and v.is_floating_point() for v in values)


class _Variances:
    """The variance of every node, and which nodes are sums.

    Attributes
    ----------
    of : dict of Node to Node
    sums : set of Node
        Nodes with elements of more than one term.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.of: dict[fx.Node, fx.Node] = {}
        self.sums: set[fx.Node] = set()

    def follow(self, node: fx.Node) -> None:
        """Add the variance of a node after it; what is not needed goes in the end."""
        with self.graph.inserting_before(node.next):
            found = self.led(node) if node.op == "call_function" else None
            if found is not None:
                self.of[node] = found
            elif isinstance(node.meta["val"], Tensor):
                self.of[node] = self.call(node, variance, node)

    def call(self, like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call a function that gives a tensor like that of another node."""
        found = self.graph.call_function(target, args, kwargs)
        found.meta = {**like.meta, "variance": like.meta["varying"]}
        return found

    def led(self, node: fx.Node) -> fx.Node | None:
        """Lead the variances of a linear operation's arguments through it, where it is known how."""
        kind = packet(node)
        varying = [source for _, source in varying_arguments(node)]
        if any(source not in self.of for source in varying):
            return None
        if kind in MOVES or kind in JOINS:
            found = self.moved(node)
        elif kind in PRODUCTS and len(varying) == 1:
            found = self.product(node)
        elif kind in (aten.add, aten.sub):
            found = self.sum(node)
        elif kind is aten.neg:
            found = self.of[varying[0]]
        elif kind is aten.addmm and len(varying) == 1 and varying[0] is node.args[1]:
            found = self.matrix_product(node)
        elif kind in MEANS:
            found = self.mean(node)
        else:
            return None
        if found is not None and (adds(node) or not self.sums.isdisjoint(varying)):
            self.sums.add(node)
        return found

    def moved(self, node: fx.Node) -> fx.Node:
        """The same operation; a constant tensor among others has no variance."""

        def other(source: fx.Node) -> fx.Node:
            if source in self.of:
                return self.of[source]
            constant = packet(node) in JOINS and isinstance(source.meta["val"], Tensor)
            return self.call(source, aten.zeros_like.default, source) if constant else source

        args, kwargs = fx.map_arg((node.args, node.kwargs), other)
        return self.call(node, node.target, *args, **kwargs)

    def product(self, node: fx.Node) -> fx.Node | None:
        """The same operation with squared weights and no bias."""
        args = list(node.args)
        if packet(node) is aten.div and args[0] not in self.of:
            return None
        for place, arg in enumerate(args[:BIAS]):
            args[place] = self.of[arg] if arg in self.of else self.squared(arg)
        if len(args) > BIAS:
            args[BIAS] = None
        return None if None in args[:BIAS] else self.call(node, node.target, *args)

    def squared(self, factor: Any) -> Any:
        """Return the square of a number or of a constant tensor."""
        if isinstance(factor, int | float):
            return factor * factor
        tensor = isinstance(factor, fx.Node) and isinstance(factor.meta["val"], Tensor)
        return self.call(factor, aten.mul.Tensor, factor, factor) if tensor else None

    def matrix_product(self, node: fx.Node) -> fx.Node | None:
        """That of ``addmm`` without factors."""
        if node.kwargs:
            return None
        return self.call(node, aten.mm.default, self.of[node.args[1]], self.squared(node.args[2]))

    def sum(self, node: fx.Node) -> fx.Node | None:
        """The sum of the variances of two terms."""
        first, second = (self.of.get(arg) for arg in node.args[:2])
        factor = node.kwargs.get("alpha", 1)
        if first is not None and second is not None:
            return self.call(node, aten.add.Tensor, first, second, alpha=factor * factor)
        kept, source = (first, node.args[0]) if second is None else (second, node.args[1])
        same = str(source.meta["val"].shape) == str(node.meta["val"].shape)
        return kept if same and factor == 1 else None

    def mean(self, node: fx.Node) -> fx.Node | None:
        """The variance of n numbers is n times that of their mean, over n^2."""
        count = counted(node)
        same = self.moved(node)
        return None if count is None else self.call(node, aten.mul.Scalar, same, 1 / count)


def adds(node: fx.Node) -> bool:
    """Say whether an operation adds elements of what varies."""
    kind = packet(node)
    two = kind in (aten.add, aten.sub) and len(varying_arguments(node)) > 1
    return two or kind in MEANS or kind in PRODUCTS - {aten.mul, aten.div} | {aten.addmm, aten.sum}


def counted(node: fx.Node) -> int | None:
    """Return of how many elements each mean is; ``None`` if that depends on the batch."""
    kind, shape = packet(node), node.args[0].meta["val"].shape
    if kind is aten.mean:
        dims = node.args[1] if len(node.args) > 1 else range(len(shape))
        sizes = [shape[dim] for dim in dims]
    else:
        spatial = int(kind.__name__[-2])  # of avg_pool2d
        sizes = list(shape[-spatial:])
        if "adaptive" in kind.__name__:
            given = node.meta["val"].shape[-spatial:]
            sizes = [max(a // b, 1) for a, b in zip(sizes, given, strict=True)]
        else:
            window = node.args[1]
            window = [window] if isinstance(window, int) else list(window)
            sizes = window * (spatial // len(window))
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def restore(graph: fx.Graph) -> fx.Graph:
    """Take the variances out of a graph again, in place."""
    for node in calls(graph):
        if node.target is activation:
            source, _, node.target, *rest = node.args
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
            (tap,) = node.args[2].values()
            copies[node] = graph.call_function(squared_change, (reference, sample, tap))
        elif node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    named = {node.name: copy for node, copy in copies.items()}
    graph.output(tuple(named[tap] for tap in taps))
    graph.eliminate_dead_code()
    graph.erase_node(next(copy for node, copy in copies.items() if node.name == "ends"))
    return graph


def squared_change(reference: dict[str, Tensor], sample: dict[str, Tensor], tap: str) -> Tensor:
    """Return (x - r)^2 of a tap."""
    return (sample[tap] - reference[tap]).square_()
