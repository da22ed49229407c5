"""Part of a pass: indices that depend on the input become one-hot floats.

An index has no gradient, and no value between two candidates. The indices that argmax, top-k and
sort give become 0/1 floats over the candidates (:mod:`fxshap.rules.ranking`), and looking something
up by an index becomes a product: ``table[index] = one_hot(index) @ table``, which is bilinear in
the index and the table. :mod:`fxshap.passes.relax_booleans` does the same for booleans and calls
these.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.nn.functional import pad
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from fxshap.passes.relax_booleans import Relaxation

aten = torch.ops.aten
ours = torch.ops.fxshap

#: The largest number of ranks times candidates: an index of a large sort stays an integer.
MAX_CANDIDATES = 1 << 16

Form = Callable[["Relaxation", fx.Node], fx.Node | None]


# --- where indices come from --------------------------------------------------------------------


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by their names in the operator's schema."""
    target: Any = node.target
    schema = target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema}
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return {**defaults, **given, **node.kwargs}


def order_of(node: fx.Node) -> str:
    """Return the order in which an operation looks for indices; "" if it does not."""
    found = named_arguments(node)
    match packet_of(node):
        case aten.topk:
            return "topk" if found["largest"] else "least"
        case aten.sort:
            return "descending" if found["descending"] else "ascending"
        case packet:
            return ONE_RANK.get(packet, "")


ONE_RANK = {
    aten.argmax: "argmax", aten.argmin: "argmin", aten.max: "max", aten.min: "min",
    aten.kthvalue: "kth",
}  # fmt: skip


def gives_index(node: fx.Node) -> bool:
    """Say whether a node is the index of a maximum, of the first k, or of a sort."""
    if node.target is operator.getitem:
        source, output = list[Any](node.args)
        return bool(output == 1 and is_aten(source) and order_of(source))
    return is_aten(node) and packet_of(node) in (aten.argmax, aten.argmin)


def index_of(twins: Relaxation, node: fx.Node) -> fx.Node | None:
    """Write the indices that an operation gives as one-hot floats; return their number."""
    source: Any = node.args[0] if node.target is operator.getitem else node
    order, found = order_of(source), named_arguments(source)
    scores = source.args[0]
    floats = twins.as_float(scores, source)
    shape = scores.meta["val"].shape
    whole = found["dim"] is None
    dim = 0 if whole or not shape else found["dim"] % len(shape)
    n = shape.numel() if whole else shape[dim]
    several = order not in ONE_RANK.values()
    count = found.get("k", n) if several else 1
    lowest = found["k"] - 1 if order == "kth" else 0
    keep = several or (found["keepdim"] and not whole)
    if floats is None or not isinstance(n, int) or n * count > MAX_CANDIDATES:
        return None

    def chosen(values: Tensor) -> Tensor:
        last = values.flatten() if whole else values.movedim(dim, -1)
        ranked: Tensor = ours.ranks(last, order, lowest, count).movedim(-2, dim)
        return ranked if keep else ranked.squeeze(dim)

    return twins.index(node, twins.run(node, chosen, floats))


# --- what is done to them -----------------------------------------------------------------------

#: Operations on the shape of an index, which leave its candidates alone.
SHAPES = (
    aten.view, aten.reshape, aten.unsqueeze, aten.squeeze, aten.transpose, aten.permute, aten.t,
    aten.expand, aten.slice, aten.select, aten.flatten, aten.repeat, aten.flip, aten.roll,
)  # fmt: skip


def reshaped(twins: Relaxation, node: fx.Node) -> fx.Node | None:
    """Do to all candidates what is done to the index."""
    index, *rest = node.args
    target: Any = node.target
    hot = twins.hot.get(index) if isinstance(index, fx.Node) else None
    if hot is None or node.kwargs:
        return None
    leaves, structure = pytree.tree_flatten(rest)
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def each(ones: Tensor, *sizes: Any) -> Any:
        given = iter(sizes)
        filled = [next(given) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        arguments = pytree.tree_unflatten(filled, structure)
        return torch.vmap(lambda one: target(one, *arguments), -1, -1)(ones)

    return twins.index(node, twins.run(node, each, hot, *nodes, pre_dispatch=False))


def one_hot(twins: Relaxation, index: fx.Node, table: fx.Node, dim: int) -> fx.Node | None:
    """Return the one-hot floats of an index into dimension `dim` of a table."""
    size, dtype = table.meta["val"].shape[dim], table.meta["val"].dtype
    return one_hot_of_size(twins, index, size, dtype) if isinstance(size, int) else None


def one_hot_of_size(twins: Relaxation, index: fx.Node, size: int, dtype: torch.dtype) -> fx.Node:
    """Return the one-hot floats of an index over so many candidates."""
    if index not in twins.hot:
        return twins.run(index, lambda u: ours.places(u, size).to(dtype), twins.twin[index])
    hot = twins.hot[index]
    more = size - hot.meta["val"].shape[-1]
    return twins.run(index, lambda ones: pad(ones, (0, more)).to(dtype), hot)


def lookup(dim_at: int | None, index_at: int, formula: Callable[..., Any]) -> Form:
    """Turn a formula of one-hot floats, a table and a dimension into the form of an operation."""

    def form(twins: Relaxation, node: fx.Node) -> fx.Node | None:
        arguments: list[Any] = list(node.args)
        table = twins.as_float(arguments[0], node)
        if table is None:
            return None
        dim = 0 if dim_at is None else arguments[dim_at] % table.meta["val"].dim()
        hot = one_hot(twins, arguments[index_at], table, dim)
        if hot is None:
            return None
        return twins.run(node, lambda ones, values: formula(ones, values, dim), hot, table)

    return form


def rows_of(ones: Tensor, table: Tensor, dim: int) -> Tensor:
    """Look up slices of a table along `dim`, by an index of any shape."""
    rows = table.movedim(dim, 0)
    flat = rows.reshape(rows.shape[0], -1)  # a table of numbers is one of rows of one
    found = (ones.reshape(-1, ones.shape[-1]) @ flat).reshape(*ones.shape[:-1], *rows.shape[1:])
    first = tuple(range(ones.dim() - 1))
    return found.movedim(first, tuple(dim + place for place in first))


def gathered(ones: Tensor, table: Tensor, dim: int) -> Tensor:
    """torch.gather."""
    for other, size in enumerate(ones.shape[:-1]):
        if other != dim and table.shape[other] != size:
            table = table.narrow(other, 0, size)
    return (ones * table.movedim(dim, -1).unsqueeze(dim)).sum(-1)


def is_one_number(twins: Relaxation, node: fx.Node) -> bool:
    """Say whether a comparison is that of an index with one number, for being it or not."""
    index, number = node.args[:2]
    equality = packet_of(node) in (aten.eq, aten.ne)
    return equality and index in twins.hot and not isinstance(number, fx.Node)


def is_candidate(twins: Relaxation, node: fx.Node, *, equal: bool) -> fx.Node:
    """index == number: one of its one-hot floats."""
    index, number = list[Any](node.args)

    def one(ones: Tensor) -> Tensor:
        there = number in range(ones.shape[-1])
        found = ones.select(-1, int(number)) if there else torch.zeros_like(ones[..., 0])
        return found if equal else 1 - found

    return twins.run(node, one, twins.hot[index])


def written_out(twins: Relaxation, node: fx.Node) -> fx.Node | None:
    """torch.nn.functional.one_hot."""
    index, size = list[Any](node.args)
    return one_hot_of_size(twins, index, size, twins.dtype)


def indexed(twins: Relaxation, node: fx.Node) -> fx.Node | None:
    """table[:, index] and table[rows, index] with one index that depends on the input."""
    source, places = list[Any](node.args)
    table = twins.as_float(source, node)
    given = [place for place, index in enumerate(places) if index is not None]
    moving = [place for place in given if places[place] in twins.twin]
    if table is None or len(moving) != 1 or given[-1] - given[0] != len(given) - 1:
        return None
    (dim,), others = moving, [places[place] for place in given if place != moving[0]]
    hot = one_hot(twins, places[dim], table, dim)
    if hot is None:
        return None
    if not others:
        return twins.run(node, lambda ones, values: rows_of(ones, values, dim), hot, table)
    start, size = given[0], hot.meta["val"].shape[-1]

    def found(ones: Tensor, values: Tensor, *constant: Tensor) -> Tensor:
        rest = iter(constant)
        candidates = torch.arange(size, device=values.device)
        shape = torch.broadcast_shapes(ones.shape[:-1], *(index.shape for index in constant))
        wide = candidates.view(-1, *[1] * len(shape))
        picks = [wide if place == dim else next(rest) for place in given]
        all_of_them = values[(slice(None),) * start + tuple(picks)].movedim(start, -1)
        weights = ones.expand(*shape, size)
        after = all_of_them.dim() - start - len(shape) - 1
        weights = weights.reshape(*shape, *[1] * after, size)
        return (all_of_them * weights).sum(-1)

    return twins.run(node, found, hot, table, *others)


# --- writing by index ---------------------------------------------------------------------------


def scattering(*, adds: bool) -> Form:
    """Turn scatter, where the last of several values in one place stays, or scatter_add into a sum.

    PyTorch leaves it open which of them stays; on a CPU it is the last.
    """

    def form(twins: Relaxation, node: fx.Node) -> fx.Node | None:
        base, dim, index, source, *rest = list[Any](node.args)
        before, values = (twins.as_float(value, node) for value in (base, source))
        if before is None or values is None or rest or node.kwargs:
            return None
        shape, reach = base.meta["val"].shape, index.meta["val"].shape
        dim %= len(shape)
        if any(shape[i] != reach[i] for i in range(len(shape)) if i != dim):
            return None
        hot = one_hot(twins, index, before, dim)
        if hot is None:
            return None

        def scatter(ones: Tensor, before: Tensor, values: Tensor) -> Tensor:
            if values.dim():
                values = values[tuple(slice(size) for size in reach)].unsqueeze(-1)
            written = ones if adds else ones - overwritten(ones, dim)
            put = (written * values).sum(dim).movedim(-1, dim)
            return before + put if adds else before * (1 - ones.amax(dim).movedim(-1, dim)) + put

        return twins.run(node, scatter, hot, before, values)

    return form


def overwritten(ones: Tensor, dim: int) -> Tensor:
    """Say in 0/1 floats which of the n indices along `dim` a later one is equal to.

    In every place this is one step, of n (one - 1) plus the number of later ones. Where it is taken
    at neither end its multiplier is 0: indices that are all different owe nothing to it.
    """
    wide = ones.to(torch.promote_types(ones.dtype, torch.float32))  # to count in
    later = wide.flip(dim).cumsum(dim).flip(dim) - wide
    found: Tensor = ours.step(wide.shape[dim] * (wide - 1) + later, "gt").to(ones.dtype)
    return found


#: How what is done with an index that depends on the input is done with its one-hot floats.
FORMS: dict[Any, Form] = {
    **dict.fromkeys(SHAPES, reshaped),
    aten.index: indexed,
    aten.gather: lookup(1, 2, gathered),
    aten.index_select: lookup(1, 2, rows_of),
    aten.embedding: lookup(None, 1, rows_of),
    aten.one_hot: written_out,
    aten.scatter: scattering(adds=False),
    aten.scatter_add: scattering(adds=True),
}

#: Where these operations take the index.
INDEX_AT = {
    aten.index: 1, aten.gather: 2, aten.index_select: 2, aten.embedding: 1, aten.one_hot: 0,
    aten.scatter: 2, aten.scatter_add: 2,
}  # fmt: skip


def is_choice(twins: Relaxation, node: fx.Node) -> bool:
    """Say whether something is done by, or to, an index that depends on the input."""
    packet = packet_of(node)
    if packet in SHAPES:
        return node.args[0] in twins.hot
    places = pytree.tree_leaves(node.args[INDEX_AT[packet]]) if packet in INDEX_AT else []
    return any(place in twins.twin for place in places)


def packet_of(node: fx.Node) -> Any:
    """Return the operator packet of a node; ``None`` for functions of Python."""
    return getattr(node.target, "overloadpacket", None)


def is_aten(node: fx.Node) -> bool:
    """Say whether a node is an operation of torch."""
    return packet_of(node) is not None
