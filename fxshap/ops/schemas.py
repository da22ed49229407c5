"""The arguments in the schema of an operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def argument_names(target: Any) -> list[str]:
    """Return the names of all arguments of an operator; none for a function without a schema."""
    return [argument.name for argument in _schema_arguments(target)]


def named_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of an operator by name, defaults included."""
    defaults = {argument.name: argument.default_value for argument in _schema_arguments(target)}
    given = dict(zip(argument_names(target), args, strict=False))
    return {**defaults, **given, **kwargs}


def _schema_arguments(target: Any) -> Sequence[Any]:
    return getattr(getattr(target, "_schema", None), "arguments", ())
