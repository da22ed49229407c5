"""Where the inputs of an explainable model enter the user's, and what is bound beside them.

They enter as the parameters of ``forward`` in order, as parameters of certain names, or in the
middle of the model, in place of what a layer gives. What else the model takes is bound: the same
for samples and references.
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
from fxshap.frontend.signature import signature

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class EntryPoint:
    """Where the inputs of an explainable model enter.

    Attributes
    ----------
    names : tuple of str or None
        The parameters of ``forward`` that they are given to; ``None`` for the first ones.
    place : Place or None
        The place in the model where they stand in for what passes.
    """

    names: tuple[str, ...] | None = None
    place: HookPoint | None = None

    def __call__(self, model: nn.Module, *inputs: Any, **rest: Any) -> Any:
        """Call the user's model."""
        if self.place is not None:
            with substitute_tensors(model, self.place, inputs):
                return model(**rest)
        names = free_parameters(model, rest) if self.names is None and rest else self.names
        if not names:
            return model(*inputs, **rest)
        if len(inputs) > len(names):
            raise InputError(
                f"{len(inputs)} inputs were given, but {type(model).__name__}.forward takes only "
                f"{', '.join(names)} beside what is bound"
            )
        return model(**dict(zip(names, inputs, strict=False)), **rest)


def free_parameters(model: nn.Module, taken: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the parameters of ``forward`` that inputs are given to in order, but those taken."""
    parameters = signature(model).parameters.values()
    return tuple(p.name for p in parameters if p.kind in POSITIONAL and p.name not in taken)


def check_parameters(model: nn.Module, names: Sequence[str]) -> None:
    """Raise unless the model's ``forward`` has parameters of these names."""
    parameters = signature(model).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            raise InputError(
                f"{type(model).__name__}.forward takes no {name!r}; it takes "
                f"{', '.join(parameters)}"
            )


def expand_bound(bound: Mapping[str, Any], like: Tensor, pairs: bool) -> dict[str, Any]:
    """Give every tensor that is bound as many rows as a call has.

    Parameters
    ----------
    bound : mapping
        Tensors of one row for all samples, or of a row for every sample; anything else is the
        same for all.
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


def has_rows(value: Any) -> bool:
    """Say whether a value is a tensor with a first dimension."""
    return isinstance(value, Tensor) and value.dim() > 0


def match_rows(name: str, value: Tensor, rows: int, pairs: bool) -> Tensor:
    """Repeat one row for all, or the samples' rows for their references."""
    if len(value) == 1:
        return value.expand(rows, *value.shape[1:])
    if pairs and 2 * len(value) == rows:
        return torch.cat([value, value])
    if len(value) == rows and not pairs:
        return value
    raise InputError(
        f"{name!r} is bound with {len(value)} rows, but this call has {rows // (1 + pairs)}; bind "
        "one row, which is for all, or a row for every sample. A tensor without rows belongs "
        "into the model: put a small nn.Module around it"
    )


def check_single_row(bound: Mapping[str, Any]) -> None:
    """Raise if a tensor is bound that has a row for every sample, which SHAP cannot tell apart."""
    for name, value in bound.items():
        if has_rows(value) and len(value) != 1:
            raise InputError(
                f"{name!r} is bound with {len(value)} rows, but SHAP compares one sample at a time "
                "with all references, and does not say which; make an explainer for each sample, "
                f"of explainable.bind({name}={name}[i:i+1])"
            )


@contextmanager
def substitute_tensors(
    model: nn.Module, place: HookPoint, tensors: Sequence[Tensor]
) -> Iterator[None]:
    """Let tensors stand in for what passes a place, which must be passed once."""
    seen: list[tuple[Tensor, ...]] = []

    def replaced(values: Any) -> Any:
        found = floating_tensors(values)
        seen.append(tuple(found))
        shapes, given = ([tuple(x.shape) for x in xs] for xs in (found, tensors))
        if shapes != given:
            raise InputError(
                f"{place} has the shapes {shapes} for what is bound, but the inputs that stand in "
                f"for it have {given}; bind the same inputs that were embedded"
            )
        instead = {id(x): tensor for x, tensor in zip(found, tensors, strict=True)}
        return pytree.tree_map(lambda leaf: instead.get(id(leaf), leaf), values)

    def entering(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return replaced((args, kwargs))

    def leaving(module: nn.Module, args: Any, output: Any) -> Any:
        return replaced(output)

    with register_hook(model, place, entering, leaving):
        yield
    single_call(place, seen)


@torch.no_grad()
def record_layer(model: nn.Module, place: HookPoint, *args: Any, **kwargs: Any) -> Any:
    """Return what passes a place when the model is called: a tensor, or a tuple of several."""
    with record_tensors(model, place) as seen:
        model(*args, **kwargs)
    found = single_call(place, seen)
    return found[0] if len(found) == 1 else found
