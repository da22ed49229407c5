"""Compute in their own order the rows that a model sorts, works on in groups, and puts back.

A mixture of experts may sort its tokens by expert, multiply every group of rows by the matrix of
its expert, and put the rows back:

    order = experts.argsort();  out[order] = grouped_mm(h[order], weights, offsets)

A row meets the weights of its expert in any order, so the same is

    out = bmm(weights[experts], h.unsqueeze(-1)).squeeze(-1)

It may as well split the sorted rows into groups by their number, and call a module on each. Such a
group is written as what a mask selects, ``h[experts == k]``, and the groups put together as rows
that are added at their positions; :mod:`fxshap.passes.densify_masks` computes both at all rows.

A node is *sorted* if it has its rows in the order that a sort over all rows gives. Its *unsorted*
form has them in their own order. Whether a model puts back what it sorts, and works on each row by
itself, is checked at the first explanation, by values
(:func:`fxshap.runtime.batching.check_densified`).
"""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx

from fxshap.graph.dataflow import value_sources
from fxshap.graph.insertion import fake_output, insert_call, insert_function
from fxshap.graph.nodes import (
    arguments_by_name,
    call_args,
    call_nodes,
    op_packet,
    size_key,
)
from fxshap.graph.symbols import free_unbacked_symbols
from fxshap.passes.canonicalize import VIEWS
from fxshap.passes.context import Context
from fxshap.passes.sorted_rows import (
    ASSIGNMENTS,
    ROW_READS,
    ROW_WRITES,
    Sort,
    accumulates,
    group_number,
    is_grouped_product,
    is_simple_product,
    row_index,
    rows_of,
    sorts_rows,
    written_rows,
)

aten = torch.ops.aten

#: Make tensors of zeros, or of what is not to be read.
BLANKS = (
    aten.zeros, aten.zeros_like, aten.new_zeros, aten.empty, aten.empty_like, aten.new_empty,
)  # fmt: skip

#: Stands for the groups of rows that may have been written where it is not known which.
ANY = (-1,)


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
    written : dict of Node to frozenset of int
        For each node of sorted rows in which groups are written, which of them.
    replaced : set of Node
        The nodes that replaced others.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.unsorted: dict[fx.Node, fx.Node] = {}
        self.sort_of: dict[fx.Node, Sort] = {}
        self.orders: set[fx.Node] = set()
        self.inverses: dict[fx.Node, Sort] = {}
        self.groups: dict[fx.Node, tuple[Sort, int]] = {}
        self.written: dict[fx.Node, frozenset[int]] = {}
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
            selected = [sort.key.meta["val"].new_empty(size, dtype=torch.long)]
            where = insert_call(
                self.graph, node, aten.where.default, (mask,), meta={"val": selected}
            )
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
        if dim != 0 or part not in self.groups:
            return
        sort, number = self.groups[part]
        if op_packet(base) in BLANKS:
            rows, written = self.no_rows(node, sort, part), frozenset[int]()
        else:
            rows, written = self.unsorted.get(base, base), self.written.get(base, frozenset(ANY))
        adds = written.isdisjoint({number, *ANY})  # there are zeros where the group goes
        self.record(node, sort, self.write(node, rows, (sort, number), part, adds=adds))
        self.written[node] = written | {number}
