"""An operation with its constant arguments bound, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Output = Tensor | tuple[Tensor, ...]

#: In which type rules compute what is of one with few digits, and a small range.
ACCUMULATE_IN = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}


@dataclass(frozen=True)
class Operation:
    """A function of its *varying* arguments: those that depend on the model's input.

    Attributes
    ----------
    target : callable
        The ATen operator, for example ``torch.ops.aten.softmax.int``.
    arguments : tuple
        Positional arguments, flattened, with ``None`` where a varying tensor goes.
    structure : TreeSpec
        How to unflatten `arguments` into ``(args, kwargs)``.
    slots : tuple of int
        Places of the varying tensors in `arguments`.
    name : str
        The node's name in the graph, for messages.
    rows : tuple of int or None
        The batch dimension of every varying tensor and, after them, of every output; ``None`` for
        what has none. Then all of it is one row.
    """

    target: Callable[..., Any]
    arguments: tuple[Any, ...]
    structure: pytree.TreeSpec
    slots: tuple[int, ...]
    name: str = ""
    rows: tuple[int | None, ...] = field(default=())

    @classmethod
    def bind(
        cls,
        target: Callable[..., Any],
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        slots: Sequence[int] = (0,),
        name: str = "",
        rows: Sequence[int | None] = (),
    ) -> tuple[Operation, tuple[Tensor, ...]]:
        """Split a call into the operation and the values of its varying tensors."""
        flat, structure = pytree.tree_flatten((tuple(args), kwargs or {}))
        varying = tuple(flat[slot] for slot in slots)
        for slot in slots:
            flat[slot] = None
        rows = tuple(rows) or (0,) * (len(slots) + 1)
        return cls(target, tuple(flat), structure, tuple(slots), name, rows), varying

    def __call__(self, *varying: Tensor) -> Output:
        """Run the operation at these values of its varying arguments."""
        flat = list(self.arguments)
        for slot, value in zip(self.slots, varying, strict=True):
            flat[slot] = value
        args, kwargs = pytree.tree_unflatten(flat, self.structure)
        output: Output = self.target(*args, **kwargs)
        return tuple(output) if isinstance(output, list) else output

    def __getitem__(self, name: str) -> Any:
        """Return the constant argument `name` of the operator's schema, or its default."""
        return self.named[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return the constant argument `name`, or `default` if the operator has none."""
        return self.named.get(name, default)

    @cached_property
    def named(self) -> dict[str, Any]:
        """The arguments by their names in the operator's schema, ``None`` for those that vary."""
        args, kwargs = pytree.tree_unflatten(list(self.arguments), self.structure)
        schema = getattr(getattr(self.target, "_schema", None), "arguments", ())
        defaults = {argument.name: argument.default_value for argument in schema}
        given = {argument.name: value for argument, value in zip(schema, args, strict=False)}
        return {**defaults, **given, **kwargs}

    @cached_property
    def accumulating(self) -> Operation:
        """The same operation in the type in which rules compute."""
        return replace(self, arguments=tuple(map(accumulating, self.arguments)))


def has_other_types(target: Any) -> bool:
    """Say whether an operator runs in all floating-point types, as a user's own may not."""
    return getattr(target, "namespace", "aten") in ("aten", "prims", "fxshap")


def accumulating(value: Any) -> Any:
    """Return a tensor or a type in which rules compute, and anything else as it is."""
    if isinstance(value, torch.dtype):
        return ACCUMULATE_IN.get(value, value)
    narrow = isinstance(value, Tensor) and value.dtype in ACCUMULATE_IN
    return value.to(ACCUMULATE_IN[value.dtype]) if narrow else value


Kept = TypeVar("Kept")


def keep(value: Tensor, what: str | Operation, function: Callable[[Tensor], Kept]) -> Kept:
    """Return ``function(value)``, computed once for as long as this very tensor lives.

    For what a rule needs of one end alone: the references stay on the tape and meet every sample
    and output, so nothing that depends on them only should be computed twice.

    Parameters
    ----------
    value : Tensor
        A tapped value, which nobody changes.
    what : str or Operation
        Names the function with its constants, or is the operation that fixes them, known by its
        name in the graph.
    function : callable
    """
    kept: dict[object, tuple[object, Kept]] = value.__dict__.setdefault("_fxshap_kept", {})
    key = (what.name or id(what)) if isinstance(what, Operation) else what
    if key not in kept:
        kept[key] = what, function(value)  # with `what`, so that its id is not given away
    return kept[key][1]


def wide(tap: Tensor) -> Tensor:
    """Return a tapped value in the type in which rules compute, kept beside it if it is another."""
    return keep(tap, "wide", accumulating) if tap.dtype in ACCUMULATE_IN else tap


def kept_of(value: Tensor) -> dict[object, Any]:
    """Return what is kept of a tensor, by names, where it is made of tensors alone."""
    kept = value.__dict__.get("_fxshap_kept", {})
    return {
        key: found
        for key, (_, found) in kept.items()
        if isinstance(key, str) and all(isinstance(x, Tensor) for x in pytree.tree_leaves(found))
    }


def with_kept(value: Tensor, kept: dict[object, Any]) -> Tensor:
    """Return a tensor of the same values of which this is kept, as :func:`kept_of` gives it."""
    value = value.detach()
    value.__dict__["_fxshap_kept"] = {key: (key, found) for key, found in kept.items()}
    return value


#: Set while rules lay out one way for all values: what they take for granted of the values.
_TAKEN: ContextVar[list[Tensor] | None] = ContextVar("taken", default=None)


@contextmanager
def for_all_values() -> Iterator[list[Tensor]]:
    """Let rules do the same whatever the values are, as a graph must that is traced once.

    Yields
    ------
    list of Tensor
        Conditions that the rules take not to hold anywhere; where one does they must be asked
        again, outside.
    """
    taken: list[Tensor] = []
    token = _TAKEN.set(taken)
    try:
        yield taken
    finally:
        _TAKEN.reset(token)


def is_for_all_values() -> bool:
    """Say whether :func:`for_all_values` holds."""
    return _TAKEN.get() is not None


def may_hold(condition: Tensor) -> bool:
    """Say whether a condition holds anywhere, or, for all values, that it may."""
    return is_for_all_values() or bool(condition.any())


def rarely_holds(condition: Tensor) -> bool:
    """Say whether a condition holds anywhere; for all values it is taken not to, and told."""
    taken = _TAKEN.get()
    if taken is None:
        return bool(condition.any())
    taken.append(condition.any())
    return False


def keep_between(operation: Operation, r: Tensor, x: Tensor, function: Callable[[], Kept]) -> Kept:
    """Return ``function()``, computed once for all outputs that walk between these very ends.

    Slopes depend on the two ends, not on the cotangent. They are kept, on the sample's tap, only
    while :func:`keeping_slopes` holds: they are as large as all activations.

    Parameters
    ----------
    operation : Operation
        Whose slopes these are.
    r, x : Tensor
        A tapped value at the two ends.
    function : callable
        Returns a tensor, or several in a tuple or a dict.
    """
    kept = x.__dict__.get("_fxshap_slopes")
    if kept is None:
        return function()
    key = (id(operation), id(r))
    if key not in kept:
        found = function()
        for slope in pytree.tree_leaves(found):
            slope.__dict__["_fxshap_is_kept"] = True
        kept[key] = operation, r, found  # with the first two, so that no id is given away
    found = kept[key][2]
    return found


@contextmanager
def keeping_slopes(taps: Iterable[Tensor]) -> Iterator[None]:
    """Keep on the taps of a sample what :func:`keep_between` is asked for."""
    taps = [tap for tap in map(wide, taps) if "_fxshap_slopes" not in tap.__dict__]
    for tap in taps:
        tap.__dict__["_fxshap_slopes"] = {}
    try:
        yield
    finally:
        for tap in taps:
            tap.__dict__.pop("_fxshap_slopes", None)


def times(slope: Tensor, grad: Tensor) -> Tensor:
    """Return ``slope * grad``, in the memory of `slope` where it fits and nobody keeps it."""
    fits = slope.shape == grad.shape and slope.dtype == grad.dtype
    own = fits and "_fxshap_is_kept" not in slope.__dict__
    return slope.mul_(grad) if own else slope * grad


def vjp(operation: Operation, point: Sequence[Tensor], grad: Any) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian product of `operation` at `point`, for floating-point arguments.

    Parameters
    ----------
    operation : Operation
    point : sequence of Tensor
        Values of the varying arguments; those that are not floating point get ``None``.
    grad : Tensor or tuple of (Tensor or None)
        Cotangent of the output.
    """
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_(differentiable(value)) for value in point]
        output = operation(*leaves)
    outputs = [output] if isinstance(output, Tensor) else list(output)
    grads = [grad] if isinstance(output, Tensor) else list(grad)
    pairs = [
        (o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not wanted:
        return tuple(torch.zeros_like(leaf) if leaf.requires_grad else None for leaf in leaves)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True
        )
    )
    return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)


def differentiable(value: Tensor) -> bool:
    """Say whether autograd can follow a tensor of this dtype."""
    return value.is_floating_point() or value.is_complex()
