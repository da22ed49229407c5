"""Values that a rule computes once: of one endpoint, or between two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from fxshap.ops.dtypes import ACCUMULATE_IN, accumulating
from fxshap.rules.core.operation import Operation

Cached = TypeVar("Cached")


def cached(value: Tensor, what: str | Operation, function: Callable[[Tensor], Cached]) -> Cached:
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
    kept: dict[object, tuple[object, Cached]] = value.__dict__.setdefault("_fxshap_kept", {})
    key = (what.name or id(what)) if isinstance(what, Operation) else what
    if key not in kept:
        kept[key] = what, function(value)  # with `what`, so that its id is not given away
    return kept[key][1]


def cached_between(
    operation: Operation, r: Tensor, x: Tensor, function: Callable[[], Cached]
) -> Cached:
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
def caching_slopes(taps: Iterable[Tensor]) -> Iterator[None]:
    """Keep on the taps of a sample what :func:`keep_between` is asked for."""
    taps = [tap for tap in map(accumulating_tap, taps) if "_fxshap_slopes" not in tap.__dict__]
    for tap in taps:
        tap.__dict__["_fxshap_slopes"] = {}
    try:
        yield
    finally:
        for tap in taps:
            tap.__dict__.pop("_fxshap_slopes", None)


def accumulating_tap(tap: Tensor) -> Tensor:
    """Return a tapped value in the type in which rules compute, kept beside it if it is another."""
    return cached(tap, "wide", accumulating) if tap.dtype in ACCUMULATE_IN else tap


def cached_values(value: Tensor) -> dict[object, Any]:
    """Return what is kept of a tensor, by names, where it is made of tensors alone."""
    kept = value.__dict__.get("_fxshap_kept", {})
    return {
        key: found
        for key, (_, found) in kept.items()
        if isinstance(key, str) and all(isinstance(x, Tensor) for x in pytree.tree_leaves(found))
    }


def with_cached_values(value: Tensor, kept: dict[object, Any]) -> Tensor:
    """Return a tensor of the same values of which this is kept, as :func:`kept_of` gives it."""
    value = value.detach()
    value.__dict__["_fxshap_kept"] = {key: (key, found) for key, found in kept.items()}
    return value


def multiply_in_place(slope: Tensor, grad: Tensor) -> Tensor:
    """Return ``slope * grad``, in the memory of `slope` where it fits and nobody keeps it."""
    fits = slope.shape == grad.shape and slope.dtype == grad.dtype
    own = fits and "_fxshap_is_kept" not in slope.__dict__
    return slope.mul_(grad) if own else slope * grad
