"""A pass: what is computed where a mask holds is computed everywhere, and chosen where it holds.

``out[mask] = f(h[mask])`` works on as many numbers as the mask holds, so its sizes depend on
values. A function that looks at each place by itself gives there what it gives among all places:

    out = where(mask, f(h), out)

So it is for places that are written as indices, ``at, slot = torch.where(mask)``, as the experts of
a mixture find their tokens: they become the indices of all places, and where the mask does not hold
nothing is added.

A node is *packed* if one of its dimensions holds the places of a mask, in order. What stands for it
has all places there. Whether a function does look at each place by itself is found out at the first
explanation, by the numbers (:func:`fxshap.runtime.batching.check_densified`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from fxshap.graph.insertion import insert_call, insert_function
from fxshap.graph.nodes import call_nodes, op_packet

aten = torch.ops.aten

READS = (aten.index, aten._unsafe_index)
WRITES = (aten.index_put, aten._unsafe_index_put, aten.index_copy, aten.index_add)
#: The indices of the places of a mask: one tensor for each of its dimensions, or all in one.
EACH_INDEX = (aten.where.default, aten.nonzero_numpy.default)
ALL_INDICES = aten.nonzero.default
#: What leaves the only index of a mask of one dimension what it is.
SAME_NUMBERS = (aten.squeeze, aten.view, aten.reshape, aten.flatten)


class MaskPositions(NamedTuple):
    """Where something is read or written: the places of a mask, in dimensions from `start` on."""

    mask: fx.Node
    start: int

    def in_one(self, value: Tensor) -> Tensor:
        """Put the dimensions of the places into one."""
        end = self.start + self.mask.meta["val"].dim() - 1
        return value.flatten(self.start, end)


class Write(NamedTuple):
    """What is written, or added, where: ``base[indices] = factor * values``."""

    base: fx.Node
    indices: Sequence[fx.Node | None]
    values: fx.Node
    adds: bool
    factor: float = 1.0


def densify_masked_ops(graph: fx.Graph, varying: set[fx.Node]) -> bool:
    """Compute what masks that depend on the input pack at all places, and say if there are any.

    Parameters
    ----------
    graph : fx.Graph
        A functional ATen graph, changed in place.
    varying : set of fx.Node
        The nodes whose values depend on those of the input.
    """
    unpacked = MaskDensifier(graph, varying)
    for node in call_nodes(graph):
        if node in varying:
            with graph.inserting_before(node):
                unpacked.visit(node)
    graph.eliminate_dead_code()
    return bool(unpacked.full)


class MaskDensifier:
    """What stands for packed nodes, at all places, and the masks that packed them."""

    def __init__(self, graph: fx.Graph, varying: set[fx.Node]) -> None:
        self.graph = graph
        self.varying = varying
        self.full: dict[fx.Node, Any] = {}
        self.mask: dict[fx.Node, fx.Node] = {}
        self.first: dict[Any, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Compute a packed node everywhere; let what is written at places be chosen there."""
        if node.target in EACH_INDEX or node.target is ALL_INDICES:
            self.keep(node, self.mask_in(node), self.indices(node))
        elif op_packet(node) is aten.masked_select and node.args[1] in self.varying:
            self.keep(node, *self.selected(node))
        elif op_packet(node) in READS and (places := self.places(list[Any](node.args)[1])):
            self.keep(node, places.mask, self.all_at(node, places))
        elif op_packet(node) in WRITES:
            new = parse_write(node)
            if places := self.places(new.indices):
                self.choose(node, new, places)
            elif new.adds:
                self.add(node, new)
        else:
            self.repeat(node)

    # --- what is known of nodes ---

    def now(self, argument: Any) -> Any:
        """Return what stands for an argument now."""
        return fx.map_arg(argument, lambda node: self.full.get(node, node))

    def keep(self, node: fx.Node, mask: fx.Node, full: Any) -> None:
        """Let something stand for a packed node."""
        self.full[node], self.mask[node] = full, mask

    def same(self, node: fx.Node) -> fx.Node:
        """Return the first node that computes the same, as ``h < 0`` written twice does."""

        def key(node: fx.Node) -> Any:
            if node.op != "call_function" or node in self.full:
                return node
            leaves, structure = pytree.tree_flatten((node.args, dict(node.kwargs)))
            parts = [self.same(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
            return node.target, str(structure), *map(repr, parts)

        return self.first.setdefault(key(node), node)

    def mask_in(self, node: fx.Node) -> fx.Node:
        """Return the mask whose places an operation finds."""
        mask = node.args[0]
        assert isinstance(mask, fx.Node)
        return self.same(mask)

    def places(self, indices: Any) -> MaskPositions | None:
        """Return the places that indices stand for: a mask, or all of its indices in order."""
        given = [place for place, index in enumerate(indices) if index is not None]
        start = given[0]
        nodes = [indices[place] for place in given]
        if given != list(range(start, start + len(given))):
            return None
        if len(nodes) == 1 and nodes[0].meta["val"].dtype == torch.bool:
            return MaskPositions(self.same(nodes[0]), start) if nodes[0] in self.varying else None
        found = [self.index_of(node) for node in nodes]
        mask = found[0] and found[0][0]
        if mask not in self.varying or found != [(mask, k) for k in range(mask.meta["val"].dim())]:
            return None
        return MaskPositions(mask, start)

    def index_of(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Say of which mask, and of which of its dimensions, a node is the index."""
        source, *rest = list[Any](node.args) or [None]
        if not isinstance(source, fx.Node):
            return None
        if node.target is operator.getitem and source.target in EACH_INDEX:
            return self.mask_in(source), rest[0]
        if op_packet(node) is aten.select and rest[0] == 1:
            if op_packet(source) is aten.slice:  # all of the other dimension
                source = list[Any](source.args)[0]
            return (self.mask_in(source), rest[1]) if source.target is ALL_INDICES else None
        if op_packet(node) in SAME_NUMBERS and source.target is ALL_INDICES:
            mask = self.mask_in(source)
            return (mask, 0) if mask.meta["val"].dim() == 1 else None
        return None

    # --- what is put in their place ---

    def run(self, like: fx.Node, function: Callable[..., Any], *inputs: fx.Node) -> Any:
        """Add the nodes of a function of tensors."""
        return insert_function(self.graph, like, function, *inputs)

    def indices(self, node: fx.Node) -> Any:
        """Write the indices of all places."""

        def all_of_them(mask: Tensor) -> Any:
            ranges = [torch.arange(size, device=mask.device) for size in mask.shape]
            grid = [index.flatten() for index in torch.meshgrid(*ranges, indexing="ij")]
            return torch.stack(grid, -1) if node.target is ALL_INDICES else tuple(grid)

        return self.run(node, all_of_them, self.now(node.args[0]))

    def all_at(self, node: fx.Node, places: MaskPositions) -> fx.Node:
        """Return the numbers at all places of what is read."""
        found: fx.Node = self.run(node, lambda x: places.in_one(x), self.now(node.args[0]))
        return found

    def selected(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Return the mask and all numbers of a ``masked_select``."""
        source, mask = list[Any](node.args)

        def all_of_them(x: Tensor, mask: Tensor) -> Tensor:
            whole: Tensor = torch.broadcast_tensors(x, mask)[0]
            return whole.flatten()

        return self.same(mask), self.run(node, all_of_them, self.now(source), self.now(mask))

    def repeat(self, node: fx.Node) -> None:
        """Do at all places what is done to packed nodes, unless it takes the places together."""
        packed = [source for source in node.all_input_nodes if source in self.full]
        masks = {self.mask[source] for source in packed}
        if len(masks) != 1 or not is_masked(node.meta["val"]):
            return
        if node.target is operator.getitem and isinstance(self.full[packed[0]], tuple):
            full = self.full[packed[0]][node.args[1]]
        else:
            args, kwargs = self.now(node.args), self.now(node.kwargs)
            target: Any = node.target
            full = insert_call(self.graph, node, target, *args, **kwargs)
        self.keep(node, masks.pop(), full)

    def choose(self, node: fx.Node, write: Write, places: MaskPositions) -> None:
        """Choose between the new and the old at every place."""
        if self.mask.get(write.values, places.mask) is not places.mask:
            return

        def chosen(base: Tensor, mask: Tensor, values: Tensor) -> Tensor:
            old = places.in_one(base)
            new = old + write.factor * values if write.adds else values
            holds = in_dimension(mask, old.dim() - places.start)
            return torch.where(holds, new, old).reshape(base.shape)

        self.become(node, write.base, chosen, write.base, places.mask, write.values)

    def add(self, node: fx.Node, write: Write) -> None:
        """Add at some indices of the places: nothing where the mask does not hold."""
        indices = [index for index in write.indices if index is not None]
        start = next(place for place, index in enumerate(write.indices) if index is not None)
        mask = self.mask.get(indices[0])
        masks = {*map(self.mask.get, indices), self.mask.get(write.values, mask)}
        if mask is None or masks != {mask} or None in write.indices[start:]:
            return

        def added(base: Tensor, mask: Tensor, values: Tensor, *at: Tensor) -> Tensor:
            holds = in_dimension(mask, base.dim() - start - len(at) + 1)
            new = torch.where(holds, write.factor * values, 0.0)
            whole: Tensor = aten.index_put(base, [None] * start + [*at], new, True)
            return whole

        self.become(node, write.base, added, write.base, mask, write.values, *indices)

    def become(
        self, node: fx.Node, base: fx.Node, function: Callable[..., Any], *inputs: fx.Node
    ) -> None:
        """Put what a function gives in the place of what is written into `base`."""
        found = self.run(node, function, *(self.now(source) for source in inputs))
        if base in self.full:
            self.keep(node, self.mask[base], found)
        else:
            node.replace_all_uses_with(found)
            self.varying.add(found)


def parse_write(node: fx.Node) -> Write:
    """Read what an operation writes."""
    if op_packet(node) in (aten.index_copy, aten.index_add):
        base, dim, index, values = list[Any](node.args)
        indices = [None] * (dim % base.meta["val"].dim()) + [index]
        factor: Any = node.kwargs.get("alpha", 1.0)
        return Write(base, indices, values, op_packet(node) is aten.index_add, factor)
    base, indices, values, *adds = list[Any](node.args)
    return Write(base, indices, values, any(adds))


def in_dimension(mask: Tensor, count: int) -> Tensor:
    """Say at each place whether a mask holds, in the first of `count` dimensions."""
    return mask.bool().flatten().reshape(-1, *[1] * (count - 1))


def is_masked(value: Any) -> bool:
    """Say whether a size, or one of a tensor's, is the number of places of a mask."""
    return bool(free_unbacked_symbols(value))
