"""Select the rows of every expert by a mask, where a model splits a list of them into experts.

A mixture of experts may list its pairs of a token and an expert, sort the list by expert, split it
by the number of tokens of each, and put the parts together again:

    token, expert = gates.nonzero().unbind(1);  order = expert.argsort()
    parts = h[token[order]].split((gates > 0).sum(0).tolist())
    y = zeros.index_add(0, token[order], cat([f(part) for f, part in zip(experts, parts)]))

Part k has the tokens that the mask of expert k selects, ``token_k = where(gates[:, k])``. So the
same is

    y = zeros.index_add(0, token_0, f_0(h[token_0])).index_add(0, token_1, f_1(h[token_1])) ...

and :mod:`fxshap.passes.densify_masks` computes each at all tokens. A node is *listed* if it
has one row for every True element of a mask, and *joined* if its rows are those of several masks,
one after the other. Whether a model works on each row by itself is checked at the first
explanation, by values (:func:`fxshap.runtime.batching.check_densified`).
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxshap.graph.dataflow import value_sources
from fxshap.graph.insertion import insert_call
from fxshap.graph.nodes import arguments_by_name, call_args, call_nodes, op_packet
from fxshap.graph.symbols import free_unbacked_symbols
from fxshap.passes.context import Context
from fxshap.passes.densify_masks import INDEX_MATRIX, INDEX_TUPLES
from fxshap.passes.sorted_rows import ROW_READS, ROW_WRITES, group_number, row_index, rows_of

aten = torch.ops.aten


class Listing(NamedTuple):
    """A list of the indices of a mask's True elements, in the order of one of its dimensions."""

    mask: fx.Node
    dim: int = 0


class Joined(NamedTuple):
    """Rows of several masks, one after the other: a key for the number of rows of each."""

    sizes: tuple[Any, ...]


def split_listed_rows(graph: fx.Graph, context: Context) -> fx.Graph:
    """Select the rows of every part of a list by a mask, in place."""
    sort_columns(graph)
    splitter = ListSplitter(graph)
    for node in call_nodes(graph):
        with graph.inserting_before(node):
            splitter.visit(node)
    graph.eliminate_dead_code()
    return graph


# --- sorts of index matrices ---------------------------------------------------------------------


def sort_columns(graph: fx.Graph) -> None:
    """Sort each column of an index matrix as a tensor of its own."""
    for node in call_nodes(graph):
        if node.target is not operator.getitem or op_packet(call_args(node)[0]) is not aten.sort:
            continue
        sort, output = call_args(node)
        arguments = arguments_by_name(sort)
        if arguments["self"].target is not INDEX_MATRIX or arguments["dim"] != 0:
            continue
        for user, column, keepdim in columns_of(node):
            with graph.inserting_before(user):
                key = insert_call(graph, user, aten.select.int, (arguments["self"], 1, column))
                of_column = insert_call(
                    graph, user, aten.sort.default, (key, 0, arguments["descending"])
                )
                result = insert_call(graph, user, operator.getitem, (of_column, output))
                if keepdim:
                    result = insert_call(graph, user, aten.unsqueeze.default, (result, 1))
            user.replace_all_uses_with(result)
    graph.eliminate_dead_code()


def columns_of(matrix: fx.Node) -> list[tuple[fx.Node, int, bool]]:
    """Return the nodes that select a column, its number, and whether it stays a matrix."""
    columns, width = [], matrix.meta["val"].shape[1]
    for user in matrix.users:
        _, *arguments = call_args(user)
        if op_packet(user) is aten.select and arguments[0] == 1:
            columns.append((user, arguments[1], False))
        elif op_packet(user) is aten.slice and arguments in ([1, k, k + 1] for k in range(width)):
            columns.append((user, arguments[1], True))
        elif op_packet(user) is aten.split and arguments == [1, 1]:
            columns += [(part, call_args(part)[1], True) for part in user.users]
        elif op_packet(user) is aten.unbind and arguments == [1]:
            columns += [(part, call_args(part)[1], False) for part in user.users]
    return [(user, column % width, keepdim) for user, column, keepdim in columns]


# --- lists that are split, and parts that are joined ---------------------------------------------


class ListSplitter:
    """Replaces the parts of lists, and what becomes of them.

    Parameters
    ----------
    graph : fx.Graph
        Changed in place.

    Attributes
    ----------
    listings : dict of Node to Listing
        Of every listed node.
    orders : dict of Node to Listing
        For the order of a list that is sorted, the list in that order.
    parts : dict of Node to list of Node
        The parts of every joined node.
    joined : dict of Node to Listing or Joined
        What its parts are.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.listings: dict[fx.Node, Listing] = {}
        self.orders: dict[fx.Node, Listing] = {}
        self.parts: dict[fx.Node, list[fx.Node]] = {}
        self.joined: dict[fx.Node, Listing | Joined] = {}
        self._listed_sizes: set[Any] = set()
        self._part_of: dict[Any, tuple[Listing, int]] = {}
        self._columns: dict[tuple[Listing, int], list[fx.Node]] = {}
        self._selected: dict[tuple[fx.Node, Listing, int], fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Record a node that is listed or joined; replace it if it is a part, or writes rows."""
        if node.target is INDEX_MATRIX or node.target in INDEX_TUPLES:
            self.record_indices(node)
        elif (part := self.part(node)) is not None:
            node.replace_all_uses_with(part)
        elif op_packet(node) is aten.cat:
            self.join(node)
        elif any(source in self.parts for source in value_sources(node)):
            self.apply_to_parts(node)
        else:
            self.follow(node)

    # --- lists ---

    def record_indices(self, node: fx.Node) -> None:
        """Record the indices of a mask. They are in the order of its first dimension."""
        (mask,) = call_args(node)
        if mask.meta["varying"]:
            self._listed_sizes.add(rows_of(node))
            if mask.meta["val"].dim() > 1:
                self.listings[node] = Listing(mask)

    def follow(self, node: fx.Node) -> None:
        """Record a node if it is listed, or the order of a list."""
        if is_sort_output(node):
            self.record_sort(node)
            return
        sources = [source for source in value_sources(node) if source in self.listings]
        listings = {self.listings[source] for source in sources}
        reads = op_packet(node) in ROW_READS
        if len(listings) != 1 or rows_of(node) not in map(rows_of, sources):
            return
        (listing,) = listings
        if reads and (index := row_index(node)) in self.orders:
            if call_args(node)[0] in sources and listing.dim == 0:
                self.listings[node] = self.orders[index]
        else:
            self.listings[node] = listing

    def record_sort(self, node: fx.Node) -> None:
        """Record the sort of a list by one of its columns."""
        is_output = node.target is operator.getitem
        arguments = arguments_by_name(call_args(node)[0] if is_output else node)
        key: fx.Node = arguments["self"]
        dim, listing = column_number(key), self.listings.get(key)
        if dim is None or listing is None or arguments["descending"]:
            return
        by_column = listing._replace(dim=dim)
        if is_output and call_args(node)[1] == 0:
            self.listings[node] = by_column
        else:
            self.orders[node] = by_column

    def part(self, node: fx.Node) -> fx.Node | None:
        """Return what a mask selects, if a node is one part of a list or of joined rows."""
        number = group_number(node)
        if number is None:
            return None
        source = call_args(node)[0]
        source = call_args(source)[0] if node.target is operator.getitem else source
        if source in self.parts:
            return self.parts[source][number]
        listing = self.listings.get(source)
        if listing is None or number >= listing.mask.meta["val"].shape[listing.dim]:
            return None
        self.add_columns(node, listing, number)
        return self.select(node, source, listing, number)

    def add_columns(self, node: fx.Node, listing: Listing, number: int) -> None:
        """Add the indices of the True elements of one slice of a mask, if they are not there."""
        if (listing, number) in self._columns:
            return
        size = node.meta["val"].shape[0]
        mask, dim = listing
        chosen = insert_call(self.graph, node, aten.select.int, (mask, dim, number))
        selected = [
            mask.meta["val"].new_empty(size, dtype=torch.long)
            for _ in range(chosen.meta["val"].dim())
        ]
        where = insert_call(self.graph, node, aten.where.default, (chosen,), meta={"val": selected})
        columns = [
            insert_call(self.graph, node, operator.getitem, (where, index))
            for index in range(len(selected))
        ]
        columns.insert(
            dim, insert_call(self.graph, node, aten.full_like.default, (columns[0], number))
        )
        self._columns[listing, number] = columns
        self._part_of[rows_of(node)] = listing, number
        self._listed_sizes.add(rows_of(node))

    def select(self, like: fx.Node, node: fx.Node, listing: Listing, number: int) -> fx.Node:
        """Return the rows of a listed node that belong to one number.

        Parameters
        ----------
        like : fx.Node
            The node that they are for.
        node : fx.Node
        listing : Listing
            The list, in the order of the dimension that the number is of.
        number : int
        """
        key = node, listing, number
        if key not in self._selected:
            self._selected[key] = self.selected(like, node, listing, number)
        return self._selected[key]

    def selected(self, like: fx.Node, node: fx.Node, listing: Listing, number: int) -> fx.Node:
        """Add the calls for :meth:`select`."""
        columns = self._columns[listing, number]
        if node.target is INDEX_MATRIX:
            value = with_rows(node.meta["val"], columns[0])
            return insert_call(
                self.graph, like, aten.stack.default, (columns, 1), meta={"val": value}
            )
        if (column := column_number(node)) is not None:
            return columns[column]
        if is_sort_output(node):  # the values, in order
            return columns[listing.dim]
        if op_packet(node) in ROW_READS and row_index(node) in self.orders:
            return self.select(like, call_args(node)[0], listing, number)

        def argument(source: fx.Node) -> fx.Node:
            if source not in self.listings:
                return source
            return self.select(like, source, listing, number)

        target: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
        value = with_rows(node.meta["val"], columns[0])
        return insert_call(self.graph, like, target, args, kwargs, meta={"val": value})

    # --- joined rows ---

    def join(self, node: fx.Node) -> None:
        """Record rows that are parts of a list, or what masks select, one after the other."""
        parts, *dim = call_args(node)
        if any(dim):
            self.apply_to_parts(node)
            return
        sizes = tuple(map(rows_of, parts))
        if not self._listed_sizes.issuperset(sizes):
            return
        known = [self._part_of.get(size) for size in sizes]
        listing = known[0][0] if known[0] else None
        is_list = listing is not None and known == [(listing, k) for k in range(count_of(listing))]
        self.parts[node] = list(parts)
        self.joined[node] = listing if listing is not None and is_list else Joined(sizes)

    def apply_to_parts(self, node: fx.Node) -> None:
        """Apply an operation on joined rows to each of their parts."""
        sources = [source for source in value_sources(node) if source in self.parts]
        kinds = {self.joined[source] for source in sources}
        if len(kinds) != 1:
            return
        (kind,) = kinds
        write = op_packet(node) in ROW_WRITES and call_args(node)[0] not in sources
        if not write and rows_of(node) not in map(rows_of, sources):
            return
        base = call_args(node)[0] if write else None
        others = [n for n in node.all_input_nodes if n not in sources and n is not base]
        unlisted = [source for source in others if self.listings.get(source) != kind]
        if any(free_unbacked_symbols(source.meta["val"]) for source in unlisted):
            return
        results: list[fx.Node] = []
        for number in range(len(self.parts[sources[0]])):

            def argument(source: fx.Node, number: int = number) -> fx.Node:
                if source in sources:
                    return self.parts[source][number]
                if source is base:
                    return results[-1] if results else source
                if source in unlisted:
                    return source
                assert isinstance(kind, Listing)
                return self.select(node, source, kind, number)

            target: Any = node.target
            args, kwargs = fx.map_arg((node.args, node.kwargs), argument)
            like = base if base is not None else self.parts[sources[0]][number]
            value = node.meta["val"] if write else with_rows(node.meta["val"], like)
            results.append(insert_call(self.graph, node, target, args, kwargs, meta={"val": value}))
        if write:
            node.replace_all_uses_with(results[-1])
        else:
            self.parts[node], self.joined[node] = results, kind


def with_rows(value: Any, like: fx.Node) -> Any:
    """Return fake tensors as another, with the number of rows that a node has.

    Running an operation on fake tensors of unknown sizes may have torch take two for equal.
    """
    rows = like.meta["val"].shape[0]
    return pytree.tree_map_only(Tensor, lambda x: x.new_empty(rows, *x.shape[1:]), value)


def is_sort_output(node: fx.Node) -> bool:
    """Return True if a node is the order of a sort, or the values in that order."""
    if node.target is operator.getitem:
        return op_packet(call_args(node)[0]) is aten.sort
    return op_packet(node) is aten.argsort


def column_number(node: fx.Node) -> int | None:
    """Return which column of the indices of a mask a node is; ``None`` if it is none."""
    if node.op != "call_function" or not node.args:
        return None
    source, *arguments = call_args(node)
    if not isinstance(source, fx.Node):
        return None
    if op_packet(node) is aten.select and source.target is INDEX_MATRIX:
        return int(arguments[1]) if arguments[0] == 1 else None
    if node.target is operator.getitem:
        if source.target in INDEX_TUPLES:
            return int(arguments[0])
        of_matrix = op_packet(source) is aten.unbind and call_args(source)[0].target is INDEX_MATRIX
        return int(arguments[0]) if of_matrix and call_args(source)[1:] == (1,) else None
    return None


def count_of(listing: Listing) -> int:
    """Return how many numbers the rows of a list are of."""
    return int(listing.mask.meta["val"].shape[listing.dim])
