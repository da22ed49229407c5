"""The arguments of a call, flattened once: explained tensors, bound tensors, and constants.

A graph takes tensors with a row for every row of the batch. Of the arguments of a call, however
nested, those that record a gradient are explained. The other tensors are bound: they are inputs of
the graph too, and equal for sample and reference. A tensor without the rows of the batch enters the
graph repeated for every row, and is taken from the first row. All other arguments are constants of
the graph.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap._compat import hashable_spec
from fxshap.errors import InputError
from fxshap.frontend.bound import Shared, expand_bound, repeat_first_row
from fxshap.frontend.inputs import has_rows


@dataclass(frozen=True)
class Call:
    """One call of an explainable model.

    Attributes
    ----------
    args : tuple
    kwargs : dict
    leaves : list
        The arguments, flattened.
    spec : TreeSpec
        How they are nested, as ``(args, kwargs)``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Flatten the arguments of a call."""
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        return cls(tuple(args), dict(kwargs), leaves, spec)

    def where(self, predicate: Callable[[Any], bool]) -> list[int]:
        """Return the indices of the leaves for which a predicate is True."""
        return [index for index, value in enumerate(self.leaves) if predicate(value)]

    @property
    def rows(self) -> int | None:
        """The number of rows, which the first tensor that has any decides."""
        first = next(filter(has_rows, self.leaves), None)
        return None if first is None else len(first)

    def with_rows(self, rows: int) -> Call:
        """Return a call of any number of rows: those of this call's first row."""
        leaves = [
            repeat_first_row(value, rows) if has_rows(value) and len(value) == self.rows else value
            for value in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return Call(args, kwargs, leaves, self.spec)

    def missing(self, bound: Mapping[str, Any]) -> dict[str, Any]:
        """Return the bound arguments that the call does not give."""
        return {name: value for name, value in bound.items() if name not in self.kwargs}

    def expand(
        self, bound: Mapping[str, Any], shared: Collection[int], pairs: bool = False
    ) -> dict[str, Any]:
        """Return bound arguments with as many rows as the call has, and the shared ones marked.

        Parameters
        ----------
        bound : mapping
        shared : collection of int
            The indices, among the flattened bound arguments, of the tensors without rows.
        pairs : bool
            Whether the rows of the call are ``[samples; references]``.
        """
        like = next(filter(has_rows, self.leaves), None)
        return dict(bound) if like is None else expand_bound(bound, shared, like, pairs)


@dataclass(frozen=True)
class Slot:
    """Where one argument of a call is found again.

    Attributes
    ----------
    index : int or None
        Its index among the tensors; ``None`` for a constant.
    shared : bool
        Whether it is the same tensor for all rows.
    constant : object
        An argument that is no tensor.
    """

    index: int | None = None
    shared: bool = False
    constant: Any = None

    def value(self, tensors: Sequence[Tensor]) -> Any:
        """Return the argument."""
        if self.index is None:
            return self.constant
        return tensors[self.index][0] if self.shared else tensors[self.index]


@dataclass(frozen=True)
class CallTemplate:
    """The arguments of a call without their tensors.

    Attributes
    ----------
    slots : tuple of Slot
        Where every argument is found again: those of the call, then those that are bound.
    spec, bound_spec : TreeSpec
        How they are nested.
    """

    slots: tuple[Slot, ...]
    spec: pytree.TreeSpec
    bound_spec: pytree.TreeSpec

    def call(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Call a function with these arguments and tensors."""
        args, kwargs, bound = self._unflatten([slot.value(tensors) for slot in self.slots])
        return function(*args, **bound, **kwargs)

    def name_of(self, index: int) -> str:
        """Return the name of a tensor for messages, such as "input 0" or "'mask'"."""
        args, kwargs, bound = self._unflatten(self.slots)
        paths, _ = pytree.tree_flatten_with_path((args, {**bound, **kwargs}))
        return next(argument_name(path) for path, slot in paths if slot.index == index)

    def _unflatten(self, leaves: Sequence[Any]) -> Iterator[Any]:
        count = self.spec.num_leaves
        yield from pytree.tree_unflatten(list(leaves[:count]), self.spec)
        yield pytree.tree_unflatten(list(leaves[count:]), self.bound_spec)


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, as the inputs of a graph.

    Attributes
    ----------
    tensors : list of Tensor
        With as many rows each; first those that are explained.
    explained : int
        How many are explained.
    template : CallTemplate
        Everything else.
    """

    tensors: list[Tensor]
    explained: int
    template: CallTemplate

    @classmethod
    def of(cls, call: Call, bound: Mapping[str, Any], explained: Sequence[int]) -> Arguments:
        """Sort the arguments of a call into explained tensors, bound tensors and constants.

        Parameters
        ----------
        call : Call
        bound : mapping
            Arguments that the call does not give, which are never explained. Tensors without rows
            are marked as :class:`Shared`.
        explained : sequence of int
            The indices of the leaves of the call that are explained.
        """
        bound_leaves, bound_spec = pytree.tree_flatten(dict(bound))
        marked = [*call.leaves, *bound_leaves]
        leaves = [value.value if isinstance(value, Shared) else value for value in marked]
        others = [
            index
            for index, value in enumerate(leaves)
            if isinstance(value, Tensor) and index not in explained
        ]
        rows = len(leaves[explained[0]]) if explained else call.rows or 0
        tensors, slots = [], [Slot(constant=value) for value in leaves]
        for position, index in enumerate([*explained, *others]):
            value = leaves[index]
            is_bound = position >= len(explained)
            without_rows = value.dim() == 0 or len(value) != rows
            shared = isinstance(marked[index], Shared) or (is_bound and without_rows)
            tensors.append(value.expand(rows, *value.shape) if shared else value)
            slots[index] = Slot(position, shared)
        return cls(tensors, len(explained), CallTemplate(tuple(slots), call.spec, bound_spec))

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two calls have in common if one graph serves both."""
        template = self.template
        slots = [(slot.index, slot.shared, constant_key(slot.constant)) for slot in template.slots]
        facts = [(x.shape[1:], x.dtype, x.device) for x in self.tensors]
        specs = map(hashable_spec, (template.spec, template.bound_spec))
        return (*specs, self.explained, *slots, *facts)

    def take(self, rows: Sequence[int]) -> Arguments:
        """Return the arguments of some rows."""
        return replace(self, tensors=[x[list(rows)] for x in self.tensors])

    def rows_by_bound(self) -> list[list[int]]:
        """Return the rows that have equal bound arguments, in a list for each of their values."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        numbers = [number_rows(x).tolist() for x in self.tensors[self.explained :]]
        for row in range(len(self.tensors[0])):
            groups[tuple(values[row] for values in numbers)].append(row)
        return list(groups.values())

    def halves(self) -> tuple[Arguments, Arguments]:
        """Split rows into those of the samples and those of the references.

        Raises
        ------
        InputError
            If there are no rows, or they are not pairs, or a bound tensor differs within a pair.
        """
        rows = [len(x) for x in self.tensors]
        if not rows[0]:
            raise InputError("the background has no rows to compare samples with")
        if rows[0] % 2 or len(set(rows)) > 1:
            raise InputError(
                "samples and references come in pairs, but the inputs have "
                f"{', '.join(map(str, rows))} rows"
            )
        pairs = [x.detach().chunk(2) for x in self.tensors]
        for index, (sample, reference) in enumerate(pairs[self.explained :], self.explained):
            if not sample.equal(reference):
                raise InputError(
                    f"{self.template.name_of(index)} is not explained, as it records no gradient, "
                    "but differs between samples and references; give both the same"
                )
        samples, references = ([pair[half] for pair in pairs] for half in (0, 1))
        return replace(self, tensors=samples), replace(self, tensors=references)


def number_rows(x: Tensor) -> Tensor:
    """Return a number for each row of a tensor, which is the same for equal rows."""
    rows = x.detach().contiguous().reshape(len(x), x[:1].numel(), 1).view(torch.uint8)
    _, numbers = torch.unique(rows, dim=0, return_inverse=True)
    return cast(Tensor, numbers)


def arguments_key(leaves: Sequence[Any], spec: pytree.TreeSpec, first_dim: int) -> tuple[Any, ...]:
    """Return what flattened arguments have in common that differ in values and numbers of rows.

    Parameters
    ----------
    leaves : sequence
    spec : TreeSpec
    first_dim : int
        The first dimension that counts: 1 leaves out the rows.
    """
    facts = [
        (x.shape[first_dim:], x.dtype, x.device) if isinstance(x, Tensor) else constant_key(x)
        for x in leaves
    ]
    return (hashable_spec(spec), *facts)


class SameObject:
    """A key that equals the key of the same object only, and keeps the object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameObject) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def constant_key(value: Any) -> Any:
    """Return what two constants have in common if a graph of one serves the other."""
    if isinstance(value, slice | range):
        return repr(value)
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value), value
    try:
        hash(value)
    except TypeError:
        return SameObject(value)
    return type(value), value


def argument_name(path: pytree.KeyPath) -> str:
    """Return the name of an argument from its path in ``(args, kwargs)``."""
    _, first, *rest = path
    inner = pytree.keystr(tuple(rest))
    if isinstance(first, pytree.SequenceKey):
        return f"input {first.idx}{inner}"
    return f"{pytree.keystr((first,)).strip('[]')}{inner}"
