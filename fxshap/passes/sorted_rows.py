"""What nodes do to rows that are sorted: sorts, products of groups, reads and writes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxshap._compat import existing_packets
from fxshap.graph.nodes import call_args, op_packet, output_tensors, size_key
from fxshap.graph.symbols import free_unbacked_symbols

aten = torch.ops.aten

SORTS = (aten.sort.default, aten.sort.stable)
ARGSORTS = (aten.argsort.default, aten.argsort.stable)

#: Assign rows in place of the old ones, unless they accumulate.
ASSIGNMENTS = (aten.index_put, aten._unsafe_index_put, aten.index_copy, aten.scatter)
#: Add rows to the old ones, or assign them.
ROW_WRITES = (*ASSIGNMENTS, aten.index_add, aten.scatter_add, aten.scatter_reduce)
ROW_READS = (aten.index, aten._unsafe_index, aten.index_select, aten.gather)

#: Products of every group of rows with a matrix of its own, with a bias or a scale.
GROUPED_PRODUCTS = existing_packets("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2")

#: Operations on the shape of an index that leave its rows as they are.
INDEX_SHAPES = (aten.unsqueeze, aten.expand, aten.view, aten.reshape, aten.repeat, aten.expand_as)


@dataclass(frozen=True)
class Sort:
    """A sort of all rows by one number for each."""

    key: fx.Node
    descending: bool


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

    ``sizes.tolist()`` reads element 0, 1, ..., and ``(group == 1).sum().item()`` the size of group
    1. A group starts after the last that its start needs.
    """
    if not isinstance(start, fx.Node):
        return 0 if start in (None, 0) else None
    read = [node for node in inputs_of(start) if op_packet(node) is aten.item]
    positions = [position_of_count(call_args(node)[0]) for node in read]
    known = [position for position in positions if position is not None]
    return max(known) + 1 if known and len(known) == len(positions) else None


def position_of_count(count: fx.Node) -> int | None:
    """Return the number of the group whose rows a node counts."""
    number = call_args(count)[-1]  # of an element of all counts
    if op_packet(count) is aten.sum:
        compared = call_args(count)[0]
        number = call_args(compared)[1] if op_packet(compared) is aten.eq else None
    return number if isinstance(number, int) else None


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """Return a node that computes a number, and all the numbers that it depends on."""
    inputs, remaining = [], [node]
    while remaining:
        node = remaining.pop()
        inputs.append(node)
        remaining += [source for source in node.all_input_nodes if not output_tensors(source)]
    return inputs


def written_rows(node: fx.Node) -> fx.Node:
    """Return the rows that an operation writes."""
    arguments = call_args(node)
    values: fx.Node = arguments[2 if isinstance(arguments[1], list | tuple) else 3]
    return values


def accumulates(node: fx.Node) -> bool:
    """Return True if an assignment adds to what is there."""
    return len(node.args) > len(("base", "indices", "values")) and node.args[-1] is True
