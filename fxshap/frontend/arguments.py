"""The arguments of a call, taken apart: tensors to explain, tensors that go along, and the rest.

A graph takes tensors with a row for every row of the batch. Of the arguments of a call, however
nested, those that record a gradient are explained; the other tensors are bound: they go along, the
same for sample and reference. A tensor without the rows of the batch is given to the graph repeated
for every row, and taken from the first. Everything else is part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.errors import InputError


@dataclass(frozen=True)
class Slot:
    """Where one argument is found again.

    Attributes
    ----------
    name : str
        What it is called in messages.
    index : int or None
        Its place among the tensors; ``None`` for `constant`.
    whole : bool
        Whether it is the same tensor for all rows.
    constant : object
        An argument that is no tensor.
    """

    name: str
    index: int | None = None
    whole: bool = False
    constant: Any = None

    def value(self, tensors: Sequence[Tensor]) -> Any:
        """Return the argument."""
        if self.index is None:
            return self.constant
        return tensors[self.index][0] if self.whole else tensors[self.index]


@dataclass(frozen=True)
class CallTemplate:
    """The arguments of a call without their tensors.

    Attributes
    ----------
    slots : tuple of Slot
        Where every argument is found again.
    spec : TreeSpec
        How they are nested.
    """

    slots: tuple[Slot, ...]
    spec: pytree.TreeSpec

    def call(self, function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Call a function with these arguments and tensors."""
        leaves = [slot.value(tensors) for slot in self.slots]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return function(*args, **kwargs)


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call.

    Attributes
    ----------
    tensors : list of Tensor
        With as many rows each; first those to explain.
    explained : int
        How many are to be explained.
    form : Form
        Everything else.
    """

    tensors: list[Tensor]
    explained: int
    form: CallTemplate

    @classmethod
    def of(
        cls, args: Sequence[Any], kwargs: Mapping[str, Any], explain: Callable[[Any], bool]
    ) -> Arguments:
        """Take the arguments of a call apart.

        Parameters
        ----------
        args : sequence
        kwargs : mapping
        explain : callable
            Says whether an argument is to be explained.
        """
        (tree, spec) = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
        chosen = [place for place, (_, value) in enumerate(tree) if explain(value)]
        along = [
            place
            for place, (_, value) in enumerate(tree)
            if place not in chosen and isinstance(value, Tensor)
        ]
        rows = len(tree[chosen[0]][1]) if chosen else 0
        tensors, slots = [], [Slot(argument_name(path), constant=value) for path, value in tree]
        for index, place in enumerate([*chosen, *along]):
            value = tree[place][1]
            whole = index >= len(chosen) and (value.dim() == 0 or len(value) != rows)
            tensors.append(value.expand(rows, *value.shape) if whole else value)
            slots[place] = Slot(argument_name(tree[place][0]), index, whole)
        return cls(tensors, len(chosen), CallTemplate(tuple(slots), spec))

    @property
    def kind(self) -> tuple[Any, ...]:
        """What two calls have in common if one graph serves both."""
        slots = [(slot.index, slot.whole, repr(slot.constant)) for slot in self.form.slots]
        facts = [(x.shape[1:], x.dtype, x.device) for x in self.tensors]
        return (self.form.spec, self.explained, *slots, *facts)

    def halves(self) -> tuple[list[Tensor], list[Tensor]]:
        """Split rows into those of the samples and those of the references.

        Raises
        ------
        InputError
            If there are none or not pairs of them, or a tensor that is bound differs within one.
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
        names = {slot.index: slot.name for slot in self.form.slots}
        for index, (sample, reference) in enumerate(pairs[self.explained :], self.explained):
            if not sample.equal(reference):
                raise InputError(
                    f"{names[index]} is not explained, as it records no gradient, but differs "
                    "between samples and references; give both the same"
                )
        return [sample for sample, _ in pairs], [reference for _, reference in pairs]


def argument_name(path: pytree.KeyPath) -> str:
    """Name an argument: 'input 0' for the first, "'mask'" for a keyword."""
    _, first, *rest = path
    inner = pytree.keystr(tuple(rest))
    if isinstance(first, pytree.SequenceKey):
        return f"input {first.idx}{inner}"
    return f"{pytree.keystr((first,)).strip('[]')}{inner}"
