"""Compute at all positions what a model computes only where a computed mask is True.

``out[mask] = f(h[mask])`` works on as many values as the mask has True elements, so its sizes
depend on values. A function that works on every position by itself gives the same there if it runs
on all positions:

    out = where(mask, f(h), out)

The same is done for positions that are written as indices, ``row, slot = torch.where(mask)``, as
the experts of a mixture find their tokens. They become the indices of all positions, and nothing is
added where the mask is False.

A node is *masked* if one of its dimensions has one entry per True element of a mask, in order. Its
*dense* form has all positions there. Whether a function really works on every position by itself is
checked at the first explanation, by values (:func:`fxshap.runtime.batching.check_densified`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxshap.graph.insertion import insert_call, insert_function
from fxshap.graph.nodes import call_args, call_nodes, op_packet, output_tensors
from fxshap.graph.symbols import free_unbacked_symbols
from fxshap.passes.context import Context

aten = torch.ops.aten

READS = (aten.index, aten._unsafe_index)
WRITES = (aten.index_put, aten._unsafe_index_put, aten.index_copy, aten.index_add)
SCATTERED_SUMS = (aten.scatter_add, aten.scatter_reduce)
#: Return the indices of a mask's True elements as one tensor for each dimension of the mask.
INDEX_TUPLES = (aten.where.default, aten.nonzero_numpy.default)
#: Returns these indices in one tensor, with one column for each dimension of the mask.
INDEX_MATRIX = aten.nonzero.default
#: Turn the one-column index matrix of a mask of one dimension into its only index.
FLATTENING = (aten.squeeze, aten.view, aten.reshape, aten.flatten)


class MaskPositions(NamedTuple):
    """The positions of a mask, in the dimensions of a tensor from `start` on."""

    mask: fx.Node
    start: int

    def flatten(self, value: Tensor) -> Tensor:
        """Flatten the dimensions of the mask into one."""
        end = self.start + self.mask.meta["val"].dim() - 1
        return value.flatten(self.start, end)


class Write(NamedTuple):
    """An assignment ``base[indices] = values``, or ``base[indices] += factor * values``."""

    base: fx.Node
    indices: Sequence[fx.Node | None]
    values: fx.Node
    adds: bool
    factor: float = 1.0


def densify_masked_ops(graph: fx.Graph, context: Context) -> fx.Graph:
    """Compute at all positions what the model computes where masks that vary are True, in place.

    Set ``context.densified`` if there is something of the kind.
    """
    densifier = MaskDensifier(graph)
    for node in call_nodes(graph):
        of_masked_shape = output_tensors(node) and any(
            map(densifier.dense.get, node.all_input_nodes)
        )
        if node.meta["varying"] or of_masked_shape:
            with graph.inserting_before(node):
                densifier.densify(node)
    graph.eliminate_dead_code()
    context.densified |= bool(densifier.dense)
    return graph


class MaskDensifier:
    """Adds the dense forms of masked nodes to a graph.

    Parameters
    ----------
    graph : fx.Graph
        Changed in place.

    Attributes
    ----------
    dense : dict of Node to Node or tuple of Node
        The dense form of every masked node.
    mask_of : dict of Node to Node
        The mask of every masked node.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.dense: dict[fx.Node, Any] = {}
        self.mask_of: dict[fx.Node, fx.Node] = {}
        self._first_equal: dict[Any, fx.Node] = {}

    def densify(self, node: fx.Node) -> None:
        """Add the dense form of a node if it is masked; replace it if it writes masked values."""
        if node.target in INDEX_TUPLES or node.target is INDEX_MATRIX:
            self.record(node, self.first_equal(call_args(node)[0]), self.all_indices(node))
        elif op_packet(node) is aten.masked_select and call_args(node)[1].meta["varying"]:
            self.record(node, *self.select_all(node))
        elif op_packet(node) in READS and (positions := self.positions(call_args(node)[1])):
            self.record(node, positions.mask, self.read_all(node, positions))
        elif op_packet(node) in WRITES:
            write = parse_write(node)
            if positions := self.positions(write.indices):
                self.write_by_where(node, write, positions)
            elif (addition := as_addition(write)) is not None:
                self.add_by_where(node, addition)
        elif op_packet(node) in SCATTERED_SUMS:
            self.scatter_zeros_elsewhere(node)
        else:
            self.apply_to_dense(node)

    # --- which nodes are masked ---

    def record(self, node: fx.Node, mask: fx.Node, dense: Any) -> None:
        """Record the dense form of a masked node."""
        self.dense[node], self.mask_of[node] = dense, mask

    def dense_argument(self, argument: Any) -> Any:
        """Return an argument with its masked nodes replaced by their dense forms."""
        return fx.map_arg(argument, lambda node: self.dense.get(node, node))

    def first_equal(self, node: fx.Node) -> fx.Node:
        """Return the first node that computes the same: ``h < 0`` may be written twice."""

        def key(node: fx.Node) -> Any:
            if node.op != "call_function" or node in self.dense:
                return node
            leaves, structure = pytree.tree_flatten((node.args, dict(node.kwargs)))
            parts = [self.first_equal(x) if isinstance(x, fx.Node) else x for x in leaves]
            return node.target, str(structure), *map(repr, parts)  # not all leaves are hashable

        return self._first_equal.setdefault(key(node), node)

    def positions(self, indices: Sequence[fx.Node | None]) -> MaskPositions | None:
        """Return the positions that indices mean if they are a mask, or all its indices in order.

        The mask depends on the input.
        """
        dims = [dim for dim, index in enumerate(indices) if index is not None]
        nodes = [index for index in indices if index is not None]
        start = dims[0]
        if dims != list(range(start, start + len(dims))):
            return None
        if len(nodes) == 1 and nodes[0].meta["val"].dtype == torch.bool:
            mask = self.first_equal(nodes[0])
            return MaskPositions(mask, start) if nodes[0].meta["varying"] else None
        sources = [self.mask_and_dim(node) for node in nodes]
        if sources[0] is None:
            return None
        mask = sources[0][0]
        all_in_order = [(mask, dim) for dim in range(mask.meta["val"].dim())]
        if sources != all_in_order or not mask.meta["varying"]:
            return None
        return MaskPositions(mask, start)

    def mask_and_dim(self, index: fx.Node) -> tuple[fx.Node, int] | None:
        """Return the mask of whose True elements a node is the index, and the dimension."""
        arguments = call_args(index)
        if not arguments or not isinstance(arguments[0], fx.Node):
            return None
        source, *rest = arguments
        if index.target is operator.getitem and source.target in INDEX_TUPLES:
            return self.first_equal(call_args(source)[0]), rest[0]
        if op_packet(index) is aten.select and rest[0] == 1:
            if op_packet(source) is aten.slice:  # all rows of the index matrix
                source = call_args(source)[0]
            if source.target is INDEX_MATRIX:
                return self.first_equal(call_args(source)[0]), rest[1]
        elif op_packet(index) in FLATTENING and source.target is INDEX_MATRIX:
            mask = self.first_equal(call_args(source)[0])
            return (mask, 0) if mask.meta["val"].dim() == 1 else None
        return None

    # --- the dense forms ---

    def insert(self, like: fx.Node, function: Callable[..., Any], *inputs: fx.Node) -> Any:
        """Add a function of the dense forms of some nodes."""
        dense = [self.dense_argument(source) for source in inputs]
        return insert_function(self.graph, like, function, *dense)

    def all_indices(self, node: fx.Node) -> Any:
        """Return the indices of all elements of a mask."""

        def indices(mask: Tensor) -> Any:
            ranges = [torch.arange(size, device=mask.device) for size in mask.shape]
            grid = [index.flatten() for index in torch.meshgrid(*ranges, indexing="ij")]
            return torch.stack(grid, -1) if node.target is INDEX_MATRIX else tuple(grid)

        return self.insert(node, indices, call_args(node)[0])

    def read_all(self, node: fx.Node, positions: MaskPositions) -> Any:
        """Return the values at all positions of what is read."""
        return self.insert(node, lambda x: positions.flatten(x), call_args(node)[0])

    def select_all(self, node: fx.Node) -> tuple[fx.Node, Any]:
        """Return the mask of a ``masked_select`` and the values at all positions."""
        source, mask = call_args(node)

        def values(x: Tensor, mask: Tensor) -> Tensor:
            broadcast: Tensor = torch.broadcast_tensors(x, mask)[0]
            return broadcast.flatten()

        return self.first_equal(mask), self.insert(node, values, source, mask)

    def apply_to_dense(self, node: fx.Node) -> None:
        """Apply an operation on masked nodes to their dense forms.

        An operation whose output is not masked, such as a sum over the True elements, stays.
        """
        masked = [source for source in node.all_input_nodes if source in self.dense]
        masks = {self.mask_of[source] for source in masked}
        if len(masks) != 1 or not has_unknown_size(node.meta["val"]):
            return
        if node.target is operator.getitem and isinstance(self.dense[masked[0]], tuple):
            dense = self.dense[masked[0]][node.args[1]]
        else:
            target: Any = node.target
            args, kwargs = self.dense_argument((node.args, node.kwargs))
            try:
                dense = insert_call(self.graph, node, target, args, kwargs)
            except RuntimeError:  # it takes this number of elements only, and stays
                return
        self.record(node, masks.pop(), dense)

    def write_by_where(self, node: fx.Node, write: Write, positions: MaskPositions) -> None:
        """Replace a write at the True positions of a mask: choose new or old at every position."""
        if self.mask_of.get(write.values, positions.mask) is not positions.mask:
            return

        def written(base: Tensor, mask: Tensor, values: Tensor) -> Tensor:
            old = positions.flatten(base)
            new = old + write.factor * values if write.adds else values
            condition = as_first_dim(mask, old.dim() - positions.start)
            return torch.where(condition, new, old).reshape(base.shape)

        result = self.insert(node, written, write.base, positions.mask, write.values)
        self.replace_write(node, write.base, result)

    def add_by_where(self, node: fx.Node, write: Write) -> None:
        """Replace an addition at some of a mask's indices: add 0 where the mask is False."""
        indices = [index for index in write.indices if index is not None]
        start = next(dim for dim, index in enumerate(write.indices) if index is not None)
        mask = self.mask_of.get(indices[0])
        masks = {*map(self.mask_of.get, indices), self.mask_of.get(write.values, mask)}
        if mask is None or masks != {mask} or None in write.indices[start:]:
            return

        def added(base: Tensor, mask: Tensor, values: Tensor, *at: Tensor) -> Tensor:
            condition = as_first_dim(mask, base.dim() - start - len(at) + 1)
            new = torch.where(condition, write.factor * values, 0.0)
            total: Tensor = aten.index_put(base, [None] * start + [*at], new, True)
            return total

        result = self.insert(node, added, write.base, mask, write.values, *indices)
        self.replace_write(node, write.base, result)

    def scatter_zeros_elsewhere(self, node: fx.Node) -> None:
        """Replace a sum of masked values at masked positions: add 0 where the mask is False."""
        base, dim, index, values, *reduce = call_args(node)
        mask = self.mask_of.get(values)
        is_sum = [*reduce, *node.kwargs.values()] in ([], ["sum"], ["sum", True])
        if dim != 0 or mask is None or self.mask_of.get(index) is not mask or not is_sum:
            return

        def added(base: Tensor, mask: Tensor, values: Tensor, index: Tensor) -> Tensor:
            new = torch.where(as_first_dim(mask, values.dim()), values, 0.0)
            return base.scatter_add(0, index, new)

        result = self.insert(node, added, base, mask, values, index)
        self.replace_write(node, base, result)

    def replace_write(self, node: fx.Node, base: fx.Node, result: Any) -> None:
        """Replace a write by its result, which is a dense form if `base` is masked."""
        if base in self.dense:
            self.record(node, self.mask_of[base], result)
        else:
            node.replace_all_uses_with(result)


def parse_write(node: fx.Node) -> Write:
    """Return what an operation writes, and where."""
    if op_packet(node) in (aten.index_copy, aten.index_add):
        base, dim, index, values = call_args(node)
        indices = [None] * (dim % max(base.meta["val"].dim(), 1)) + [index]
        factor: Any = node.kwargs.get("alpha", 1.0)
        return Write(base, indices, values, op_packet(node) is aten.index_add, factor)
    base, indices, values, *adds = call_args(node)
    return Write(base, indices, values, any(adds))


def as_addition(write: Write) -> Write | None:
    """Return a write that adds, if ``base[indices] = base[indices] + values`` is one.

    It is if no index occurs twice: of two values for one position, one would stay. An expert finds
    each of its tokens once.
    """
    if write.adds:
        return write
    if op_packet(write.values) not in (aten.add, aten.sub) or write.values.kwargs:
        return None
    old, new = call_args(write.values)[:2]
    if is_read(new, write) and op_packet(write.values) is aten.add:
        old, new = new, old
    if not is_read(old, write) or not isinstance(new, fx.Node):
        return None
    factor = 1.0 if op_packet(write.values) is aten.add else -1.0
    return write._replace(values=new, adds=True, factor=factor)


def is_read(node: Any, write: Write) -> bool:
    """Return True if a node reads what a write replaces."""
    if not isinstance(node, fx.Node) or op_packet(node) not in READS:
        return False
    return call_args(node) == (write.base, write.indices)


def as_first_dim(mask: Tensor, dims: int) -> Tensor:
    """Return a flattened mask as booleans, in the first of several dimensions."""
    return mask.bool().flatten().reshape(-1, *[1] * (dims - 1))


def has_unknown_size(value: Any) -> bool:
    """Return True if a size, or one of a tensor's sizes, depends on values."""
    return bool(free_unbacked_symbols(value))
