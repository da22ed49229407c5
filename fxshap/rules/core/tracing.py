"""Conditions on values, on which a traced graph cannot branch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

#: While rules are traced: conditions that they assume to hold nowhere.
_ASSUMPTIONS: ContextVar[list[Tensor] | None] = ContextVar("assumptions", default=None)


@contextmanager
def tracing_rules() -> Iterator[list[Tensor]]:
    """Make rules compute the same for all values, as a graph that is traced once must.

    Yields
    ------
    list of Tensor
        Conditions that the rules assume to hold nowhere. Where one holds, the rules must be called
        again outside of this context.
    """
    assumptions: list[Tensor] = []
    token = _ASSUMPTIONS.set(assumptions)
    try:
        yield assumptions
    finally:
        _ASSUMPTIONS.reset(token)


def is_tracing_rules() -> bool:
    """Return True inside :func:`tracing_rules`."""
    return _ASSUMPTIONS.get() is not None


def any_or_tracing(condition: Tensor) -> bool:
    """Return True if a condition holds anywhere, and always while rules are traced."""
    return is_tracing_rules() or bool(condition.any())


def any_unless_tracing(condition: Tensor) -> bool:
    """Return True if a condition holds anywhere.

    While rules are traced, assume that it holds nowhere and record the assumption.
    """
    assumptions = _ASSUMPTIONS.get()
    if assumptions is None:
        return bool(condition.any())
    assumptions.append(condition.any())
    return False
