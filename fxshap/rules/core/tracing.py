"""Conditions on values that a traced graph cannot branch on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

#: Set while rules lay out one way for all values: what they take for granted of the values.
_ASSUMPTIONS: ContextVar[list[Tensor] | None] = ContextVar("taken", default=None)


@contextmanager
def tracing_rules() -> Iterator[list[Tensor]]:
    """Let rules do the same whatever the values are, as a graph must that is traced once.

    Yields
    ------
    list of Tensor
        Conditions that the rules take not to hold anywhere; where one does they must be asked
        again, outside.
    """
    taken: list[Tensor] = []
    token = _ASSUMPTIONS.set(taken)
    try:
        yield taken
    finally:
        _ASSUMPTIONS.reset(token)


def is_tracing_rules() -> bool:
    """Say whether :func:`for_all_values` holds."""
    return _ASSUMPTIONS.get() is not None


def any_or_tracing(condition: Tensor) -> bool:
    """Say whether a condition holds anywhere, or, for all values, that it may."""
    return is_tracing_rules() or bool(condition.any())


def any_unless_tracing(condition: Tensor) -> bool:
    """Say whether a condition holds anywhere; for all values it is taken not to, and told."""
    taken = _ASSUMPTIONS.get()
    if taken is None:
        return bool(condition.any())
    taken.append(condition.any())
    return False
