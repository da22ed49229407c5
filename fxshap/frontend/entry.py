"""The entry point of the explained inputs into the user's model, and the arguments bound to it.

The inputs enter as the first parameters of ``forward``, as parameters that are given by name, or in
the middle of the model, where they replace the tensors at a hook point. All other arguments of the
model are bound: they are the same for samples and references.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxshap.errors import InputError
from fxshap.frontend.hook_point import (
    HookPoint,
    floating_tensors,
    record_tensors,
    register_hook,
    single_call,
)
from fxshap.frontend.inputs import has_rows
from fxshap.frontend.signature import signature

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


# --- where the inputs enter ---------------------------------------------------------------------


@dataclass(frozen=True)
class EntryPoint:
    """Where the inputs of an explainable model enter the user's model.

    Attributes
    ----------
    input_names : tuple of str or None
        The parameters of ``forward`` that the inputs are passed as; ``None`` for the first ones.
    hook_point : HookPoint or None
        The hook point at which the inputs replace the model's own tensors.
    """

    input_names: tuple[str, ...] | None = None
    hook_point: HookPoint | None = None

    def __call__(self, model: nn.Module, *inputs: Any, **bound: Any) -> Any:
        """Call the user's model with these inputs and bound arguments."""
        if self.hook_point is not None:
            with substitute_tensors(model, self.hook_point, inputs):
                return model(**bound)
        names = self.input_names
        if names is None and bound:
            names = free_parameters(model, bound)
        if not names:
            return model(*inputs, **bound)
        if len(inputs) > len(names):
            raise InputError(
                f"{len(inputs)} inputs were given, but besides the bound arguments "
                f"{type(model).__name__}.forward takes only {', '.join(names)}"
            )
        return model(**dict(zip(names, inputs, strict=False)), **bound)


def free_parameters(model: nn.Module, bound: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the positional parameters of ``forward`` that are not bound, in order."""
    parameters = signature(model).parameters.values()
    return tuple(p.name for p in parameters if p.kind in POSITIONAL and p.name not in bound)


def check_parameters(model: nn.Module, names: Sequence[str]) -> None:
    """Raise an InputError unless the model's ``forward`` has parameters of these names."""
    parameters = signature(model).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            raise InputError(
                f"{type(model).__name__}.forward takes no {name!r}; it takes "
                f"{', '.join(parameters)}"
            )


# --- bound arguments ----------------------------------------------------------------------------


def expand_bound(bound: Mapping[str, Any], like: Tensor, pairs: bool) -> dict[str, Any]:
    """Return bound arguments in which every tensor has as many rows as the inputs of a call.

    Parameters
    ----------
    bound : mapping of str to object
        Tensors have one row for all samples, or one row for every sample. Other values stay.
    like : Tensor
        An input of the call.
    pairs : bool
        Whether its rows are ``[samples; references]``.

    Raises
    ------
    InputError
        If a tensor has another number of rows.
    """
    return {
        name: match_rows(name, value.to(like.device), len(like), pairs)
        if has_rows(value)
        else value
        for name, value in bound.items()
    }


def match_rows(name: str, value: Tensor, rows: int, pairs: bool) -> Tensor:
    """Repeat a single row for all rows of a call, or the samples' rows for their references."""
    if len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    if pairs and 2 * len(value) == rows:
        return torch.cat([value, value])
    if len(value) == rows and not pairs:
        return value
    raise InputError(
        f"{name!r} is bound with {len(value)} rows, but this call has {rows // (1 + pairs)}; bind "
        "one row, which is used for all, or a row for every sample. A tensor without a batch "
        "dimension belongs into the model: wrap the model in a small nn.Module that holds it"
    )


# --- inputs at a hook point ---------------------------------------------------------------------


@torch.no_grad()
def record_layer(model: nn.Module, hook_point: HookPoint, *args: Any, **kwargs: Any) -> Any:
    """Call the model, and return the tensor, or the tuple of tensors, at a hook point."""
    with record_tensors(model, hook_point) as calls:
        model(*args, **kwargs)
    tensors = single_call(hook_point, calls)
    return tensors[0] if len(tensors) == 1 else tensors


@contextmanager
def substitute_tensors(
    model: nn.Module, hook_point: HookPoint, tensors: Sequence[Tensor]
) -> Iterator[None]:
    """Have the model use these tensors in place of its own at a hook point, which it calls once."""
    calls: list[tuple[Tensor, ...]] = []

    def replaced(values: Any) -> Any:
        own = floating_tensors(values)
        calls.append(tuple(own))
        check_same_shapes(hook_point, own, tensors)
        replacements = {id(x): tensor for x, tensor in zip(own, tensors, strict=True)}
        return pytree.tree_map(lambda leaf: replacements.get(id(leaf), leaf), values)

    def input_hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return replaced((args, kwargs))

    def output_hook(module: nn.Module, args: Any, output: Any) -> Any:
        return replaced(output)

    with register_hook(model, hook_point, input_hook, output_hook):
        yield
    single_call(hook_point, calls)


def check_same_shapes(
    hook_point: HookPoint, own: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Raise an InputError unless the inputs have the shapes of the model's own tensors."""
    expected, given = ([tuple(x.shape) for x in tensors] for tensors in (own, inputs))
    if expected != given:
        raise InputError(
            f"with the bound arguments {hook_point} has the shapes {expected}, but the inputs that "
            f"replace it have the shapes {given}; bind the arguments that the prefix was called "
            "with"
        )
