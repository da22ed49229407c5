"""Conditions on values, on which a traced graph cannot branch, and whose values cost a wait.

Rules take another formula where a condition holds. There are three ways to treat a condition:

- Ordinarily its value is read. On a GPU the processor waits for that.
- In :func:`deferring_conditions` it is assumed to hold nowhere, and recorded. All recorded
  conditions are read together at the end.
- In :func:`tracing_rules` rules compute the same for all values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Assumptions:
    """The conditions that rules assume to hold nowhere, while they are traced or deferred."""

    tracing: bool
    conditions: list[Tensor] = field(default_factory=list)


_ASSUMPTIONS: ContextVar[Assumptions | None] = ContextVar("assumptions", default=None)


@contextmanager
def assuming(tracing: bool) -> Iterator[list[Tensor]]:
    """Collect the conditions that rules assume to hold nowhere."""
    assumptions = Assumptions(tracing)
    token = _ASSUMPTIONS.set(assumptions)
    try:
        yield assumptions.conditions
    finally:
        _ASSUMPTIONS.reset(token)


@contextmanager
def tracing_rules() -> Iterator[list[Tensor]]:
    """Make rules compute the same for all values, as a graph that is traced once must.

    Yields
    ------
    list of Tensor
        Conditions that the rules assume to hold nowhere. Where one holds, the rules must be called
        again outside of this context.
    """
    with assuming(tracing=True) as conditions:
        yield conditions


@contextmanager
def deferring_conditions() -> Iterator[list[Tensor]]:
    """Make rules record rare conditions instead of reading them; yields as `tracing_rules`."""
    with assuming(tracing=False) as conditions:
        yield conditions


def is_tracing_rules() -> bool:
    """Return True inside :func:`tracing_rules`."""
    assumptions = _ASSUMPTIONS.get()
    return assumptions is not None and assumptions.tracing


def is_deferring() -> bool:
    """Return True inside :func:`deferring_conditions`."""
    assumptions = _ASSUMPTIONS.get()
    return assumptions is not None and not assumptions.tracing


def reading_waits(value: Tensor) -> bool:
    """Return True if the processor waits for a device when it reads a value."""
    return not value.is_cpu


def avoids_reading(value: Tensor) -> bool:
    """Return True if rules should rather compute more than read something of this tensor."""
    return is_tracing_rules() or (is_deferring() and reading_waits(value))


def any_or_tracing(condition: Tensor, rare: bool = False) -> bool:
    """Return True if a condition holds anywhere, and always while rules are traced.

    Parameters
    ----------
    condition : Tensor
    rare : bool
        Whether to assume and record that it holds nowhere while conditions are deferred. Otherwise
        the condition is read then where that costs no wait, and else taken to hold.
    """
    if rare and is_deferring():
        return any_unless_tracing(condition)
    return avoids_reading(condition) or bool(condition.any())


def any_unless_tracing(condition: Tensor) -> bool:
    """Return True if a condition holds anywhere.

    While rules are traced, or conditions deferred, assume that it holds nowhere and record that.
    """
    assumptions = _ASSUMPTIONS.get()
    if assumptions is None:
        return bool(condition.any())
    assumptions.conditions.append(condition.any())
    return False
