"""Values that a rule computes once: of one endpoint, or between the two endpoints."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import ACCUMULATE_IN, accumulating
from fxshap.rules.core.operation import Operation

Value = TypeVar("Value")


class TensorCache:
    """A dict of values for each tensor, which is dropped together with the tensor.

    Tensors are told apart by identity: an alias, such as ``tensor.detach()``, has values of its
    own. A weak reference removes the values of a tensor before its id can be reused.
    ``torch.utils.weak.WeakIdKeyDictionary`` does the same, but makes a reference at every lookup,
    and rules look something up for every operation of every backward pass.

    A value must not refer to its tensor, nor be a view of it, or neither is ever freed.
    """

    def __init__(self) -> None:
        self._values: dict[int, dict[Any, Any]] = {}
        self._references: dict[int, weakref.ref[Tensor]] = {}

    def get(self, tensor: Tensor) -> dict[Any, Any] | None:
        """Return the values of a tensor, ``None`` if it has no entry."""
        return self._values.get(id(tensor))

    def add(self, tensor: Tensor) -> dict[Any, Any]:
        """Return the values of a tensor; make an entry if it has none."""
        key = id(tensor)
        if key not in self._references:
            self._references[key] = weakref.ref(tensor, lambda _: self._remove(key))
        return self._values.setdefault(key, {})

    def discard(self, tensor: Tensor) -> None:
        """Drop the values of a tensor, if it has an entry."""
        self._remove(id(tensor))

    def _remove(self, key: int) -> None:
        self._references.pop(key, None)
        self._values.pop(key, None)


#: Values of one endpoint, by what they are.
_OF_ENDPOINT = TensorCache()
#: Values between two endpoints, at the sample's tap, by the operation and the reference's tap.
_BETWEEN = TensorCache()
#: Tensors of `_BETWEEN`, which must not be changed in place.
_SHARED = TensorCache()


def cached(value: Tensor, what: str | Operation, function: Callable[[Tensor], Value]) -> Value:
    """Return ``function(value)``, computed once for as long as this very tensor lives.

    This is for values that depend on one endpoint only. The references stay on the tape for every
    sample and output, so nothing that depends on them only should be computed twice.

    Parameters
    ----------
    value : Tensor
        A tapped value; it must not be changed in place.
    what : str or Operation
        Names the function and its constants, or is the operation that holds the constants. An
        operation is identified by its name in the graph.
    function : callable
        Its result must not be a view of `value`.
    """
    values = _OF_ENDPOINT.get(value)
    if values is None:
        values = _OF_ENDPOINT.add(value)
    key = (what.name or id(what)) if isinstance(what, Operation) else what
    if key not in values:
        values[key] = what, function(value)  # with `what`, so that its id is not reused
    result: Value = values[key][1]
    return result


def cached_between(
    operation: Operation, r: Tensor, x: Tensor, function: Callable[[], Value]
) -> Value:
    """Return ``function()``, computed once for all outputs between these very endpoints.

    Multipliers that depend on the two endpoints, but not on the cotangent, serve every output. They
    are cached only inside :func:`caching_between`, because they are as large as all activations.

    Parameters
    ----------
    operation : Operation
        The operation whose multipliers these are.
    r, x : Tensor
        A tapped value at the two endpoints.
    function : callable
        Returns a tensor, or several in a tuple or a dict.
    """
    values = _BETWEEN.get(x)
    if values is None:
        return function()
    key = (id(operation), id(r))
    if key not in values:
        computed = function()
        for tensor in pytree.tree_leaves(computed):
            _SHARED.add(tensor)
        values[key] = operation, r, computed  # with the first two, so that no id is reused
    result: Value = values[key][2]
    return result


def caches_between(x: Tensor) -> bool:
    """Return True inside :func:`caching_between` for a tap of the sample."""
    return _BETWEEN.get(x) is not None


@contextmanager
def caching_between(taps: Iterable[Tensor]) -> Iterator[None]:
    """Cache what :func:`cached_between` computes for these taps of a sample."""
    taps = [tap for tap in map(accumulating_tap, taps) if _BETWEEN.get(tap) is None]
    for tap in taps:
        _BETWEEN.add(tap)
    try:
        yield
    finally:
        for tap in taps:
            _BETWEEN.discard(tap)


def mark_repetition(tap: Tensor, before: Tensor) -> None:
    """Record that every row of a tap repeats a row of another tensor."""
    _OF_ENDPOINT.add(tap)["before repetition"] = None, before


def before_repetition(tap: Tensor) -> Tensor:
    """Return the rows that a tap of many rows repeats, or the tap if it repeats none."""
    before: Tensor = (_OF_ENDPOINT.get(tap) or {}).get("before repetition", (None, tap))[1]
    return before


def accumulating_tap(tap: Tensor) -> Tensor:
    """Return a tapped value in the type in which rules compute, cached if it is another type."""
    return cached(tap, "accumulating", accumulating) if tap.dtype in ACCUMULATE_IN else tap


def cached_values(value: Tensor) -> dict[str, Any]:
    """Return the cached values of a tensor by their names, those that consist of tensors only."""
    values = _OF_ENDPOINT.get(value) or {}
    return {
        key: result
        for key, (_, result) in values.items()
        if isinstance(key, str) and all(isinstance(x, Tensor) for x in pytree.tree_leaves(result))
    }


def with_cached_values(value: Tensor, values: dict[str, Any]) -> Tensor:
    """Return an alias of a tensor with these cached values, as :func:`cached_values` gives them."""
    alias = value.detach()
    _OF_ENDPOINT.add(alias).update({key: (key, result) for key, result in values.items()})
    return alias


def multiply_in_place(slope: Tensor, grad: Tensor) -> Tensor:
    """Return ``slope * grad``, in the memory of `slope` if it fits there and is not cached."""
    fits = slope.shape == grad.shape and slope.dtype == grad.dtype
    if fits and _SHARED.get(slope) is None:
        return slope.mul_(grad)
    return slope * grad
