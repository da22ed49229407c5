"""Relax indices that depend on the input to one-hot floats.

:mod:`fxshap.passes.relax_booleans` is the pass that calls these functions.

An index has no gradient, and no value between two candidates. The indices that argmax, top-k and
sort return become 0/1 floats over the candidates (:mod:`fxshap.rules.ranking`). A lookup becomes a
product: ``table[index] = one_hot(index) @ table``, which is bilinear in the index and the table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

from fxshap.graph.nodes import (
    arguments_by_name,
    call_args,
    is_operator,
    nodes_in,
    op_packet,
    size_key,
)
from fxshap.passes.relaxation import Relaxation, RelaxFn

aten = torch.ops.aten
ours = torch.ops.fxshap

#: The largest number of ranks times candidates. An index of a larger sort stays an integer.
MAX_CANDIDATES = 1 << 16


# --- where indices come from --------------------------------------------------------------------

#: Operations that return one index, and the name of their order in :mod:`fxshap.rules.ranking`.
ONE_RANK = {
    aten.argmax: "argmax", aten.argmin: "argmin", aten.max: "max", aten.min: "min",
    aten.kthvalue: "kth",
}  # fmt: skip


def ranking_order(node: fx.Node) -> str | None:
    """Return the order in which an operation ranks candidates; ``None`` if it ranks none."""
    packet = op_packet(node)
    if packet is aten.topk:
        return "topk" if arguments_by_name(node)["largest"] else "least"
    if packet is aten.sort:
        return "descending" if arguments_by_name(node)["descending"] else "ascending"
    return ONE_RANK.get(packet)


def gives_index(node: fx.Node) -> bool:
    """Return True if a node is the index of a maximum, of the first k, or of a sort."""
    if node.target is operator.getitem:
        source, output = call_args(node)
        return output == 1 and is_operator(source) and ranking_order(source) is not None
    return op_packet(node) in (aten.argmax, aten.argmin)


def relax_index(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """Add the one-hot floats of the indices that an operation returns; return their number."""
    source: fx.Node = call_args(node)[0] if node.target is operator.getitem else node
    order, options = ranking_order(source), arguments_by_name(source)
    scores = call_args(source)[0]
    values = relaxation.as_float(scores, source)
    shape = scores.meta["val"].shape
    flattened = options["dim"] is None
    dim = 0 if flattened or not shape else options["dim"] % len(shape)
    n = shape.numel() if flattened else shape[dim]
    one_rank = order in ONE_RANK.values()
    count = 1 if one_rank else options.get("k", n)
    lowest = options["k"] - 1 if order == "kth" else 0
    keepdim = not one_rank or (options["keepdim"] and not flattened)
    if values is None or not isinstance(n, int) or n * count > MAX_CANDIDATES:
        return None

    def one_hot(values: Tensor) -> Tensor:
        last = values.flatten() if flattened else values.movedim(dim, -1)
        ranked: Tensor = ours.ranks(last, order, lowest, count).movedim(-2, dim)
        return ranked if keepdim else ranked.squeeze(dim)

    return relaxation.index(node, relaxation.function(node, one_hot, values))


# --- the shape of an index -----------------------------------------------------------------------

#: Operations on the shape of an index, which do not change its candidates.
INDEX_RESHAPES = (
    aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.transpose, aten.permute, aten.t,
    aten.expand, aten.slice, aten.select, aten.flatten, aten.repeat, aten.flip, aten.roll,
)  # fmt: skip


def reshape_index(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """Apply to the floats of every candidate what is applied to the index."""
    index, *rest = call_args(node)
    target: Any = node.target
    if index not in relaxation.one_hot or node.kwargs:
        return None
    leaves, structure = pytree.tree_flatten(rest)

    def reshape(ones: Tensor, *sizes: Any) -> Any:
        remaining = iter(sizes)
        filled = [next(remaining) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        arguments = pytree.tree_unflatten(filled, structure)
        return torch.vmap(lambda candidate: target(candidate, *arguments), -1, -1)(ones)

    inputs = (relaxation.one_hot[index], *nodes_in(leaves))
    return relaxation.index(node, relaxation.function(node, reshape, *inputs, pre_dispatch=False))


# --- one-hot floats ------------------------------------------------------------------------------


def one_hot_into(
    relaxation: Relaxation, index: fx.Node, table: fx.Node, dim: int
) -> fx.Node | None:
    """Return the one-hot floats of an index into dimension `dim` of a table."""
    size, dtype = table.meta["val"].shape[dim], table.meta["val"].dtype
    return one_hot_of_size(relaxation, index, size, dtype) if isinstance(size, int) else None


def one_hot_of_size(
    relaxation: Relaxation, index: fx.Node, size: int, dtype: torch.dtype
) -> fx.Node:
    """Return the one-hot floats of an index with `size` candidates."""
    if index not in relaxation.one_hot:

        def from_number(number: Tensor) -> Tensor:
            ones: Tensor = ours.one_hot_position(number, size).to(dtype)
            return ones

        return relaxation.function(index, from_number, relaxation.floats[index])
    one_hot = relaxation.one_hot[index]
    more = size - one_hot.meta["val"].shape[-1]
    return relaxation.function(index, lambda ones: pad(ones, (0, more)).to(dtype), one_hot)


def relax_one_hot(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """torch.nn.functional.one_hot."""
    index, size = call_args(node)
    return one_hot_of_size(relaxation, index, size, relaxation.dtype)


def is_candidate_check(relaxation: Relaxation, node: fx.Node) -> bool:
    """Return True if a comparison is ``index == number`` or ``index != number``."""
    index, number = node.args[:2]
    is_equality = op_packet(node) in (aten.eq, aten.ne)
    return is_equality and index in relaxation.one_hot and not isinstance(number, fx.Node)


def relax_candidate_check(relaxation: Relaxation, node: fx.Node, *, equal: bool) -> fx.Node:
    """``index == number`` is one of the index's one-hot floats."""
    index, number = call_args(node)

    def check(ones: Tensor) -> Tensor:
        exists = number in range(ones.shape[-1])
        is_number = ones.select(-1, int(number)) if exists else torch.zeros_like(ones[..., 0])
        return is_number if equal else 1 - is_number

    return relaxation.function(node, check, relaxation.one_hot[index])


# --- reading by index ----------------------------------------------------------------------------


def relax_lookup(
    dim_position: int | None, index_position: int, formula: Callable[..., Any]
) -> RelaxFn:
    """Return the relaxation of a lookup in the first argument.

    Parameters
    ----------
    dim_position, index_position : int
        The positions of the dimension and of the index among the arguments. Without a position for
        the dimension, it is the first.
    formula : callable
        ``formula(one_hot, table, dim) -> result``.
    """

    def relax(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
        arguments = call_args(node)
        table = relaxation.as_float(arguments[0], node)
        if table is None:
            return None
        dim = 0 if dim_position is None else arguments[dim_position] % table.meta["val"].dim()
        one_hot = one_hot_into(relaxation, arguments[index_position], table, dim)
        if one_hot is None:
            return None
        return relaxation.function(
            node, lambda ones, values: formula(ones, values, dim), one_hot, table
        )

    return relax


def look_up_rows(ones: Tensor, table: Tensor, dim: int) -> Tensor:
    """Look up slices of a table along `dim`, by an index of any shape."""
    rows = table.movedim(dim, 0)
    flat = rows.reshape(rows.shape[0], -1)  # a table of numbers has rows of one element
    result = (ones.reshape(-1, ones.shape[-1]) @ flat).reshape(*ones.shape[:-1], *rows.shape[1:])
    index_dims = tuple(range(ones.dim() - 1))
    return result.movedim(index_dims, tuple(dim + k for k in index_dims))


def look_up_elements(ones: Tensor, table: Tensor, dim: int) -> Tensor:
    """torch.gather: one element of `table` along `dim` for every index."""
    for other, size in enumerate(ones.shape[:-1]):
        if other != dim and table.shape[other] != size:
            table = table.narrow(other, 0, size)
    return (ones * table.movedim(dim, -1).unsqueeze(dim)).sum(-1)


def relax_indexing(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
    """table[:, index] and table[rows, index] with one index that depends on the input."""
    source, indices = call_args(node)
    if not any(index in relaxation.floats for index in nodes_in(indices)):
        return reshape_index(relaxation, node)
    table = relaxation.as_float(source, node)
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    relaxed_dims = [dim for dim in dims if indices[dim] in relaxation.floats]
    if table is None or len(relaxed_dims) != 1 or dims[-1] - dims[0] != len(dims) - 1:
        return None
    (dim,) = relaxed_dims
    one_hot = one_hot_into(relaxation, indices[dim], table, dim)
    if one_hot is None:
        return None
    if dims == [dim]:
        return relaxation.function(
            node, lambda ones, values: look_up_rows(ones, values, dim), one_hot, table
        )
    constant = [indices[other] for other in dims if other != dim]
    return relaxation.function(node, joint_indexing(dims, dim), one_hot, table, *constant)


def joint_indexing(dims: list[int], dim: int) -> Callable[..., Tensor]:
    """Return a function that looks up by indices of several dimensions, one of them one-hot.

    Parameters
    ----------
    dims : list of int
        The dimensions that have an index, one after the other.
    dim : int
        The one with the one-hot index.
    """
    start = dims[0]

    def look_up(ones: Tensor, values: Tensor, *constant: Tensor) -> Tensor:
        size = ones.shape[-1]
        remaining = iter(constant)
        candidates = torch.arange(size, device=values.device)
        shape = torch.broadcast_shapes(ones.shape[:-1], *(index.shape for index in constant))
        every_candidate = candidates.view(-1, *[1] * len(shape))
        indices = [every_candidate if other == dim else next(remaining) for other in dims]
        of_candidates = values[(slice(None),) * start + tuple(indices)].movedim(start, -1)
        weights = ones.expand(*shape, size)
        after = of_candidates.dim() - start - len(shape) - 1
        weights = weights.reshape(*shape, *[1] * after, size)
        return (of_candidates * weights).sum(-1)

    return look_up


# --- writing by index ---------------------------------------------------------------------------


def relax_scatter(*, adds: bool) -> RelaxFn:
    """Return the relaxation of scatter or scatter_add, as a sum.

    Of several values in one position, scatter keeps one. PyTorch does not define which; on a CPU it
    is the last.
    """

    def relax(relaxation: Relaxation, node: fx.Node) -> fx.Node | None:
        base, dim, index, source, *rest = call_args(node)
        before, values = (relaxation.as_float(value, node) for value in (base, source))
        if before is None or values is None or rest or node.kwargs:
            return None
        shape, index_shape = base.meta["val"].shape, index.meta["val"].shape
        dim %= len(shape)
        if any(shape[i] != index_shape[i] for i in range(len(shape)) if i != dim):
            return None
        one_hot = one_hot_into(relaxation, index, before, dim)
        if one_hot is None:
            return None
        sizes = values.meta["val"].shape or index_shape
        used = tuple(
            slice(None) if size_key(size) == size_key(own) else slice(size)
            for size, own in zip(index_shape, sizes, strict=True)
        )

        def write(ones: Tensor, before: Tensor, values: Tensor) -> Tensor:
            if values.dim():
                values = values[used].unsqueeze(-1)
            staying = ones if adds else ones - is_overwritten(ones, dim)
            written = (staying * values).sum(dim).movedim(-1, dim)
            if adds:
                return before + written
            return before * (1 - ones.amax(dim).movedim(-1, dim)) + written

        return relaxation.function(node, write, one_hot, before, values)

    return relax


def is_overwritten(ones: Tensor, dim: int) -> Tensor:
    """Return 1 for each of the n indices along `dim` that equals a later one, and 0 for others.

    At every position this is one step, of n (one - 1) plus the number of later ones. If neither
    endpoint passes the step its multiplier is 0, so that indices that are all different get no
    attribution from it.
    """
    counted = ones.to(torch.promote_types(ones.dtype, torch.float32))
    later = counted.flip(dim).cumsum(dim).flip(dim) - counted
    repeated: Tensor = ours.step(counted.shape[dim] * (counted - 1) + later, "gt")
    return repeated.to(ones.dtype)


# --- the tables ----------------------------------------------------------------------------------

#: For each operation on a relaxed index, its floating-point form.
INDEX_USES: dict[Any, RelaxFn] = {
    **dict.fromkeys(INDEX_RESHAPES, reshape_index),
    aten.index: relax_indexing,
    aten.gather: relax_lookup(1, 2, look_up_elements),
    aten.index_select: relax_lookup(1, 2, look_up_rows),
    aten.embedding: relax_lookup(None, 1, look_up_rows),
    aten.one_hot: relax_one_hot,
    aten.scatter: relax_scatter(adds=False),
    aten.scatter_add: relax_scatter(adds=True),
}

#: The position of the index among the arguments of these operations.
INDEX_POSITIONS = {
    aten.index: 1, aten.gather: 2, aten.index_select: 2, aten.embedding: 1, aten.one_hot: 0,
    aten.scatter: 2, aten.scatter_add: 2,
}  # fmt: skip


def uses_index(relaxation: Relaxation, node: fx.Node) -> bool:
    """Return True if a node reads or writes by a relaxed index, or changes an index's shape."""
    packet = op_packet(node)
    if packet in INDEX_RESHAPES:
        return node.args[0] in relaxation.one_hot
    if packet not in INDEX_POSITIONS:
        return False
    indices = nodes_in(call_args(node)[INDEX_POSITIONS[packet]])
    constant = not any(index.meta["varying"] for index in indices)
    if packet is aten.index and constant:
        return node.args[0] in relaxation.one_hot
    return any(index in relaxation.floats for index in indices)
