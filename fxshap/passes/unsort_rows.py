"""Compute in their own order the rows that a model sorts, works on in groups, and puts back.

A mixture of experts may sort its tokens by expert, multiply every group of rows by the matrix of
its expert, and put the rows back:

    order = experts.argsort();  out[order] = grouped_mm(h[order], weights, ends)

A row meets the weights of its expert in any order, so the same is

    out = bmm(weights[experts], h.unsqueeze(-1)).squeeze(-1)

It may as well split the sorted rows into groups by their number, and call a module on each. Such a
group is written as what a mask selects, ``h[experts == k]``, and the groups put together as rows
that are added at their places; :mod:`fxshap.passes.densify_masks` computes both at all rows.

A node is *sorted* if it has its rows in the order that a sort over all rows gives. Its *unsorted*
form has them in their own order. Whether a model puts back what it sorts, and works on each row by
itself, is checked at the first explanation, by values
(:func:`fxshap.runtime.batching.check_densified`).
"""

from __future__ import annotations

import operator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxshap._compat import existing_packets
from fxshap.graph.dataflow import value_sources
from fxshap.graph.insertion import fake_output, insert_call, insert_function
from fxshap.graph.nodes import (
    arguments_by_name,
    call_args,
    call_nodes,
    op_packet,
    output_tensors,
    size_key,
)
from fxshap.passes.canonicalize import VIEWS
from fxshap.passes.context import Context

aten = torch.ops.aten

SORTS = (aten.sort.default, aten.sort.stable)
ARGSORTS = (aten.argsort.default, aten.argsort.stable)

#: Products of every group of rows with a matrix of its own, with a bias or a scale.
GROUPED_PRODUCTS = existing_packets("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2")

#: Operations on the shape of an index that leave its rows as they are.
INDEX_SHAPES = (aten.unsqueeze, aten.expand, aten.view, aten.reshape, aten.repeat, aten.expand_as)

#: Assign rows in place of the old ones, unless they accumulate.
ASSIGNMENTS = (aten.index_put, aten._unsafe_index_put, aten.index_copy, aten.scatter)
#: Add rows to the old ones, or assign them.
ROW_WRITES = (*ASSIGNMENTS, aten.index_add, aten.scatter_add, aten.scatter_reduce)
ROW_READS = (aten.index, aten._unsafe_index, aten.index_select, aten.gather)


def unsort_rows(graph: fx.Graph, context: Context) -> fx.Graph:
    """Compute sorted rows in their own order, in place.

    Set ``context.densified`` if there is something of the kind.
    """
    unsorter = RowUnsorter(graph)
    for node in call_nodes(graph):
        with graph.inserting_before(node):
            unsorter.unsort(node)
    graph.eliminate_dead_code()
    update_sizes(graph, unsorter.replaced)
    context.densified |= bool(unsorter.replaced)
    return graph


def update_sizes(graph: fx.Graph, changed: set[fx.Node]) -> None:
    """Compute the fake values of what follows nodes that have changed, where sizes were unknown."""
    for node in call_nodes(graph):
        if changed.isdisjoint(node.all_input_nodes) or not free_unbacked_symbols(node.meta["val"]):
            continue
        if op_packet(node) in (*VIEWS, aten.reshape):
            infer_size(node)
        with suppress(Exception):  # what is still unknown is reported by `check_static`
            node.meta["val"] = fake_output(node, node)
            changed.add(node)


def infer_size(node: fx.Node) -> None:
    """Have a view infer its size where the only unknown one is written as a number."""
    source, sizes = call_args(node)
    unknown = [isinstance(n, fx.Node) and bool(free_unbacked_symbols(n.meta["val"])) for n in sizes]
    if sum(unknown) == 1 and -1 not in sizes:
        sizes = [-1 if flag else size for flag, size in zip(unknown, sizes, strict=True)]
        node.args = (source, sizes)


@dataclass(frozen=True)
class Sort:
    """A sort of all rows by one number for each."""

    key: fx.Node
    descending: bool


class RowUnsorter:
    """Adds the unsorted forms of sorted nodes to a graph.

    Parameters
    ----------
    graph : fx.Graph
        Changed in place.

    Attributes
    ----------
    unsorted : dict of Node to Node
        The unsorted form of every sorted node.
    sort_of : dict of Node to Sort
        The sort that ordered the rows of every sorted node.
    orders : set of Node
        The nodes that are the order of a sort itself, ``order = key.argsort()``.
    inverses : dict of Node to Sort
        The inverses of such orders.
    groups : dict of Node to (Sort, int)
        For each node whose rows are those of one group, the sort and the number of the group.
    replaced : set of Node
        The nodes that took the place of others.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.unsorted: dict[fx.Node, fx.Node] = {}
        self.sort_of: dict[fx.Node, Sort] = {}
        self.orders: set[fx.Node] = set()
        self.inverses: dict[fx.Node, Sort] = {}
        self.groups: dict[fx.Node, tuple[Sort, int]] = {}
        self.replaced: set[fx.Node] = set()
        self._selected: dict[tuple[Sort, int], fx.Node] = {}

    def unsort(self, node: fx.Node) -> None:
        """Add the unsorted form of a node if it is sorted; replace it if it puts rows back."""
        if sorts_rows(node):
            self.record_sort(node)
            return
        if self.in_groups(node):
            return
        sorts = {self.sort_of[source] for source in self.sorted_sources(node)}
        if len(sorts) != 1:
            return
        (sort,) = sorts
        if (number := group_number(node)) is not None:
            self.select_group(node, sort, number)
        elif op_packet(node) is aten.split_with_sizes and free_unbacked_symbols(node.meta["val"]):
            self.sort_of[node] = sort  # its parts are groups
        elif self.inverts_order(node):
            self.inverses[node] = sort
        elif op_packet(node) in ROW_WRITES:
            self.write_unsorted(node)
        elif op_packet(node) in ROW_READS and call_args(node)[0] in self.unsorted:
            self.put_back(node, sort)
        elif is_grouped_product(node):
            self.multiply_by_row(node, sort)
        elif rows_of(node) in {rows_of(source) for source in self.sorted_sources(node)}:
            self.record(node, sort, self.read_unsorted(node) or self.apply_to_unsorted(node))

    # --- which nodes are sorted ---

    def sorted_sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the sorted nodes of which a node reads the values."""
        return [source for source in value_sources(node) if source in self.sort_of]

    def record(self, node: fx.Node, sort: Sort, unsorted: fx.Node) -> None:
        """Record the unsorted form of a sorted node."""
        self.unsorted[node], self.sort_of[node] = unsorted, sort

    def record_sort(self, node: fx.Node) -> None:
        """Record the order of a sort, or the values in that order."""
        source = call_args(node)[0] if node.target is operator.getitem else node
        arguments = arguments_by_name(source)
        sort = Sort(arguments["self"], arguments["descending"])
        if node.target is operator.getitem and node.args[1] == 0:
            self.record(node, sort, sort.key)
        elif sort.key in self.orders:  # the order of an order is its inverse
            self.inverses[node] = self.sort_of[sort.key]
        else:
            self.record(node, sort, self.row_numbers(node, sort))
            self.orders.add(node)

    def inverts_order(self, node: fx.Node) -> bool:
        """Return True for ``inverse[order] = arange(rows)``."""
        if op_packet(node) not in ASSIGNMENTS:
            return False
        index, values = row_index(node), call_args(node)[-1]
        return index in self.orders and op_packet(values) is aten.arange

    # --- the unsorted forms ---

    def row_numbers(self, node: fx.Node, sort: Sort) -> fx.Node:
        """Return the number of every row."""

        def numbers(key: Tensor) -> Tensor:
            return torch.arange(key.shape[0], device=key.device)

        result: fx.Node = insert_function(self.graph, node, numbers, sort.key)
        return result

    def read_unsorted(self, node: fx.Node) -> fx.Node | None:
        """Return `rows` for ``rows[order]``."""
        if op_packet(node) not in ROW_READS or row_index(node) not in self.orders:
            return None
        source: fx.Node = call_args(node)[0]
        return source if rows_of(source) == rows_of(node) else None

    def apply_to_unsorted(self, node: fx.Node) -> fx.Node:
        """Apply an operation on sorted rows to their unsorted forms."""
        target: Any = node.target
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda source: self.unsorted.get(source, source)
        )
        return insert_call(self.graph, node, target, args, kwargs)

    def multiply_by_row(self, node: fx.Node, sort: Sort) -> None:
        """Multiply every row by the matrix whose number it was sorted by."""
        rows, weights, *_ = call_args(node)
        if rows in self.unsorted and not sort.descending and is_simple_product(node):
            product = self.product_by_row(node, self.unsorted[rows], weights, sort.key)
            self.record(node, sort, product)

    def product_by_row(
        self, node: fx.Node, rows: fx.Node, weights: fx.Node, number: fx.Node
    ) -> fx.Node:
        """Return the products of rows with the matrices that have their numbers."""
        transposed = op_packet(weights) is aten.transpose
        if transposed:  # select from what is stored, which needs no copy
            weights = call_args(weights)[0]

        def product(rows: Tensor, weights: Tensor, number: Tensor) -> Tensor:
            chosen: Tensor = aten.index.Tensor(weights, [number])
            if transposed:
                return torch.bmm(chosen, rows.unsqueeze(-1)).squeeze(-1)
            return torch.bmm(rows.unsqueeze(1), chosen).squeeze(1)

        result: fx.Node = insert_function(self.graph, node, product, rows, weights, number)
        return result

    # --- rows that are put back ---

    def put_back(self, node: fx.Node, sort: Sort) -> None:
        """Replace ``rows[inverse]`` by the unsorted rows."""
        index = row_index(node)
        if index is not None and self.inverses.get(index) == sort:
            self.replace(node, self.unsorted[call_args(node)[0]])

    def write_unsorted(self, node: fx.Node) -> None:
        """Replace a write of sorted rows: it writes the same in any order."""
        base, index, values = call_args(node)[0], row_index(node), written_rows(node)
        if base in self.unsorted or index not in self.unsorted or values not in self.unsorted:
            return
        if index in self.orders and op_packet(node) in ASSIGNMENTS and not accumulates(node):
            value = base.meta["val"]

            def assigned(values: Tensor) -> Tensor:
                return values.expand(values.shape[0], *value.shape[1:]).to(value.dtype)

            result = insert_function(self.graph, node, assigned, self.unsorted[values])
        else:
            result = self.apply_to_unsorted(node)
        self.replace(node, result)

    def replace(self, node: fx.Node, result: fx.Node) -> None:
        """Replace a node that puts rows back."""
        node.replace_all_uses_with(result)
        self.replaced.add(result)

    # --- groups of rows ---

    def select_group(self, node: fx.Node, sort: Sort, number: int) -> None:
        """Replace the rows of one group of sorted rows by those that a mask selects."""
        source = call_args(node)[0]
        source = call_args(source)[0] if node.target is operator.getitem else source
        if source not in self.unsorted or sort.descending:
            return
        rows = self.rows_of_group(node, sort, number)
        if source not in self.orders:
            rows = insert_call(
                self.graph, node, aten.index.Tensor, (self.unsorted[source], [rows]),
                meta={"val": node.meta["val"]},
            )  # fmt: skip
        self.groups[rows] = sort, number
        node.replace_all_uses_with(rows)

    def rows_of_group(self, node: fx.Node, sort: Sort, number: int) -> fx.Node:
        """Return the indices of the rows of a group."""
        if (sort, number) not in self._selected:
            size = node.meta["val"].shape[0]
            mask = insert_call(self.graph, node, aten.eq.Scalar, (sort.key, number))
            found = [sort.key.meta["val"].new_empty(size, dtype=torch.long)]
            where = insert_call(self.graph, node, aten.where.default, (mask,), meta={"val": found})
            self._selected[sort, number] = insert_call(
                self.graph, node, operator.getitem, (where, 0)
            )
        return self._selected[sort, number]

    def in_groups(self, node: fx.Node) -> bool:
        """Follow a node that works on the rows of one group, or puts groups together.

        Return True if it is such a node.
        """
        groups = {self.groups[source] for source in value_sources(node) if source in self.groups}
        if not groups:
            return False
        if op_packet(node) is aten.cat:
            self.join_groups(node)
        elif op_packet(node) is aten.slice_scatter:
            self.write_group(node)
        elif op_packet(node) is aten.expand_as and call_args(node)[0] in self.groups:
            self.expand_group(node)
        elif len(groups) == 1 and free_unbacked_symbols(node.meta["val"]):
            (self.groups[node],) = groups
        return True

    def expand_group(self, node: fx.Node) -> None:
        """Replace an expansion to the shape of other rows of the group, where it does nothing."""
        part, other = call_args(node)
        shapes = [[*map(size_key, x.meta["val"].shape[1:])] for x in (part, other)]
        if shapes[0] == shapes[1]:
            node.replace_all_uses_with(part)

    def join_groups(self, node: fx.Node) -> None:
        """Record rows that are all groups, one after the other."""
        parts, *dim = call_args(node)
        groups = [self.groups.get(part) for part in parts]
        sorts = {group[0] for group in groups if group}
        if any(dim) or len(sorts) != 1 or groups != [(*sorts, k) for k in range(len(parts))]:
            return
        (sort,) = sorts
        joined = self.no_rows(node, sort, parts[0])
        for number, part in enumerate(parts):
            joined = self.write(node, joined, (sort, number), part, adds=True)
        self.record(node, sort, joined)

    def no_rows(self, node: fx.Node, sort: Sort, part: fx.Node) -> fx.Node:
        """Return zeros of the size of all rows."""
        value = part.meta["val"]

        def zeros(key: Tensor) -> Tensor:
            return key.new_zeros(key.shape[0], *value.shape[1:], dtype=value.dtype)

        result: fx.Node = insert_function(self.graph, node, zeros, sort.key)
        return result

    def write(
        self, node: fx.Node, rows: fx.Node, group: tuple[Sort, int], part: fx.Node, *, adds: bool
    ) -> fx.Node:
        """Write the rows of a group among all rows."""
        return insert_call(
            self.graph, node, aten.index_put.default, (rows, [self._selected[group]], part, adds),
            meta={"val": rows.meta["val"]},
        )  # fmt: skip

    def write_group(self, node: fx.Node) -> None:
        """Record sorted rows in which those of one group are written."""
        base, part, dim, *_ = (*call_args(node), 0)
        if dim == 0 and part in self.groups:
            group = self.groups[part]
            base = self.unsorted.get(base, base)
            self.record(node, group[0], self.write(node, base, group, part, adds=False))


# --- what nodes do ------------------------------------------------------------------------------


def is_simple_product(node: fx.Node) -> bool:
    """Return True if a node multiplies groups of rows by matrices of their own, and no more."""
    if op_packet(node) is torch.ops.fxshap.grouped_mm:
        return True
    # transformers registers its own when it is imported, for types and devices without a kernel.
    if getattr(node.target, "namespace", "") != "transformers":
        return False
    return op_packet(node) is getattr(torch.ops.transformers, "grouped_mm_fallback", None)


def is_grouped_product(node: fx.Node) -> bool:
    """Return True if a node multiplies groups of rows by matrices of their own."""
    return op_packet(node) in GROUPED_PRODUCTS or is_simple_product(node)


def sorts_rows(node: fx.Node) -> bool:
    """Return True if a node is the order, or the values in order, of a sort of all rows."""
    source: fx.Node = node
    if node.target is operator.getitem:
        source = call_args(node)[0]
    if source.target not in (SORTS if source is not node else ARGSORTS):
        return False
    key = call_args(source)[0].meta
    is_batch = isinstance(key["val"].shape[0], torch.SymInt) if key["val"].dim() else False
    return key["val"].dim() == 1 and (is_batch or key["varying"])


def rows_of(node: fx.Node) -> Any:
    """Return a key for the number of rows of a node's outputs; ``None`` if they differ."""
    value = node.meta.get("val")
    outputs = value if isinstance(value, list | tuple) else [value]
    rows = {size_key(x.shape[0]) if isinstance(x, Tensor) and x.dim() else None for x in outputs}
    return rows.pop() if len(rows) == 1 else None


def row_index(node: fx.Node) -> fx.Node | None:
    """Return the index by which an operation reads or writes rows; ``None`` if there is no such."""
    _, *arguments = call_args(node)
    if isinstance(arguments[0], list | tuple):
        index, *others = arguments[0]
        return None if any(other is not None for other in others) else index
    dim, index = arguments[:2]
    while op_packet(index) in INDEX_SHAPES:  # one number for each element of a row
        index = index.args[0]
    return index if dim == 0 else None


def group_number(node: fx.Node) -> int | None:
    """Return which group a node is of sorted rows that are split by unknown numbers of rows."""
    if op_packet(node) is aten.slice and free_unbacked_symbols(node.meta["val"]):
        _, dim, start, *_ = (*call_args(node), 0, None)
        return None if dim else position_of_size(start)
    if node.target is operator.getitem:
        source, number = call_args(node)
        if op_packet(source) is aten.split_with_sizes and any(call_args(source)[2:]) is False:
            return int(number) if free_unbacked_symbols(source.meta["val"]) else None
    return None


def position_of_size(start: Any) -> int | None:
    """Return the number of the group that starts where others end, from where their sizes are read.

    ``sizes.tolist()`` reads element 0, 1, ...; a group starts after the last that its start needs.
    """
    if not isinstance(start, fx.Node):
        return 0 if start in (None, 0) else None
    read = [node for node in inputs_of(start) if op_packet(node) is aten.item]
    positions = [call_args(call_args(node)[0])[-1] for node in read]
    return max(positions) + 1 if positions else None


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """Return a node that computes a number, and all the numbers that it depends on."""
    found, remaining = [], [node]
    while remaining:
        node = remaining.pop()
        found.append(node)
        remaining += [source for source in node.all_input_nodes if not output_tensors(source)]
    return found


def written_rows(node: fx.Node) -> fx.Node:
    """Return the rows that an operation writes."""
    arguments = call_args(node)
    values: fx.Node = arguments[2 if isinstance(arguments[1], list | tuple) else 3]
    return values


def accumulates(node: fx.Node) -> bool:
    """Return True if an assignment adds to what is there."""
    return len(node.args) > len(("base", "indices", "values")) and node.args[-1] is True
