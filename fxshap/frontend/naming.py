"""Names of inputs: parameters of ``forward``, and entries of the containers that it takes.

``"mask"`` is a parameter. ``"batch.age"`` is the entry ``"age"`` of the dict, or the attribute of
the object, that the parameter ``batch`` takes; ``"series.0"`` the first item of a list. If
``forward`` has only one parameter, the name of an entry is enough.
"""

from __future__ import annotations

import collections.abc
import copy
import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.errors import InputError
from fxshap.frontend.signature import signature

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

#: How a function receives arguments that have no parameters of their own.
SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

Parameters = Mapping[str, inspect.Parameter]


@dataclass(frozen=True)
class InputPath:
    """Where one input goes.

    Attributes
    ----------
    parameter : str
        A parameter of ``forward``.
    keys : tuple of str or int
        Leads into the container that the parameter takes; empty for the parameter itself.
    """

    parameter: str
    keys: tuple[str | int, ...] = ()


def resolve_names(model: nn.Module, names: Sequence[str]) -> tuple[InputPath, ...]:
    """Return where the inputs of these names go.

    Raises
    ------
    InputError
        If the model's ``forward`` takes no input of a name.
    """
    parameters = signature(model).parameters
    return tuple(resolve_name(model, parameters, name) for name in names)


def resolve_name(model: nn.Module, parameters: Parameters, name: str) -> InputPath:
    """Return where the input of a name goes."""
    named = {n: p for n, p in parameters.items() if p.kind not in SEVERAL}
    if name in named:
        return InputPath(name)
    first, *keys = name.split(".")
    if keys and first in named:
        return InputPath(first, tuple(int(key) if key.isdigit() else key for key in keys))
    if len(named) < len(parameters) and any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    ):
        return InputPath(name)
    required = [p for p in named.values() if p.default is inspect.Parameter.empty]
    if len(required) == 1 and annotated_type(model, required[0]) is not Tensor:
        key = int(name) if name.isdigit() else name
        return InputPath(required[0].name, (key,))
    raise InputError(
        f"{type(model).__name__}.forward takes no {name!r}; it takes {', '.join(parameters)}. An "
        "entry of a dict, a list or an object is named 'parameter.entry'"
    )


#: Annotations of containers, by their names.
CONTAINERS = {"list": list, "sequence": list, "iterable": list, "tuple": tuple}


def annotated_type(model: nn.Module, parameter: inspect.Parameter) -> Any:
    """Return the type of a parameter as annotated, without its items; None if it is unknown."""
    if torch.compiler.is_dynamo_compiling():  # which cannot evaluate annotations
        written = parameter.annotation
        name = written if isinstance(written, str) else getattr(written, "__name__", "")
        return CONTAINERS.get(name.partition("[")[0].rpartition(".")[2].lower())
    try:
        hint = typing.get_type_hints(model.forward).get(parameter.name)
    except Exception:  # names of types that are imported for type checkers only
        return None
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        hint = members[0] if len(members) == 1 else None
    return typing.get_origin(hint) or hint


# --- arguments of a call ------------------------------------------------------------------------


def assign_inputs(
    paths: Sequence[InputPath], inputs: Sequence[Any], bound: Mapping[str, Any]
) -> dict[str, Any]:
    """Return keyword arguments in which the inputs are at their paths.

    Parameters
    ----------
    paths : sequence of InputPath
        At least as many as inputs.
    inputs : sequence of object
    bound : mapping
        Other arguments. A container among them keeps its other entries, and is not changed.
    """
    arguments = dict(bound)
    entries: dict[str, list[tuple[tuple[str | int, ...], Any]]] = {}
    for path, value in zip(paths, inputs, strict=False):
        if path.keys:
            entries.setdefault(path.parameter, []).append((path.keys, value))
        else:
            arguments[path.parameter] = value
    for parameter, items in entries.items():
        arguments[parameter] = with_entries(arguments.get(parameter), items)
    return arguments


def with_entries(container: Any, items: Sequence[tuple[tuple[str | int, ...], Any]]) -> Any:
    """Return a copy of a container with these entries; a new one if there is none yet.

    Parameters
    ----------
    container : dict, list, tuple, object or None
    items : sequence of (keys, value)
    """
    by_key: dict[str | int, list[tuple[tuple[str | int, ...], Any]]] = {}
    for (key, *rest), value in items:
        by_key.setdefault(key, []).append((tuple(rest), value))
    if container is None:
        integers = all(isinstance(key, int) for key in by_key)
        container = [None] * len(by_key) if integers else {}
    entries = {}
    for key, inner in by_key.items():
        deeper = [(rest, value) for rest, value in inner if rest]
        entries[key] = with_entries(entry(container, key), deeper) if deeper else inner[-1][1]
    return replace_entries(container, entries)


def entry(container: Any, key: str | int) -> Any:
    """Return an entry of a container, or None."""
    if isinstance(container, Mapping):
        return container.get(key)
    if isinstance(container, list | tuple):
        return container[key] if isinstance(key, int) and key < len(container) else None
    return getattr(container, str(key), None)


def replace_entries(container: Any, entries: Mapping[str | int, Any]) -> Any:
    """Return a copy of a container with other entries."""
    if isinstance(container, tuple) and hasattr(container, "_replace"):  # a named tuple
        return container._replace(**{str(key): value for key, value in entries.items()})
    if isinstance(container, list | tuple):
        items = list(container) + [None] * (max(map(int, entries)) + 1 - len(container))
        for key, value in entries.items():
            items[int(key)] = value
        return type(container)(items)
    if dataclasses.is_dataclass(container) and not isinstance(container, type):
        return dataclasses.replace(container, **{str(k): value for k, value in entries.items()})
    changed = copy.copy(container)
    if isinstance(container, collections.abc.MutableMapping):
        changed.update(entries)
    else:
        for key, value in entries.items():
            setattr(changed, str(key), value)
    return changed


# --- inputs without names -----------------------------------------------------------------------


def free_parameters(model: nn.Module, bound: Mapping[str, Any]) -> list[inspect.Parameter]:
    """Return the parameters of ``forward`` that unnamed inputs fill, in order.

    They are those that can be given by position and are not bound, then keyword-only ones without
    a default.
    """
    free = [p for p in signature(model).parameters.values() if p.name not in bound]
    required = [
        p
        for p in free
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is inspect.Parameter.empty
    ]
    return [p for p in free if p.kind in POSITIONAL] + required


def takes_any_number(model: nn.Module) -> bool:
    """Return True if the model's ``forward`` takes ``*inputs``."""
    kinds = {p.kind for p in signature(model).parameters.values()}
    return inspect.Parameter.VAR_POSITIONAL in kinds


def packing_type(
    model: nn.Module, free: Sequence[inspect.Parameter], inputs: Sequence[Any]
) -> type | None:
    """Return ``list`` or ``tuple`` if the first free parameter takes all inputs in one, or None.

    It does if it is annotated so, or if it is the only one and there are several inputs.
    """
    if not free or not all(isinstance(x, Tensor) for x in inputs):
        return None
    hint = annotated_type(model, free[0])
    if hint in (list, collections.abc.Sequence, collections.abc.Iterable):
        return list
    if hint is tuple:
        return tuple
    return list if len(free) == 1 < len(inputs) and hint in (None, Any) else None
