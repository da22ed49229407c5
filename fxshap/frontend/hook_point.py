"""A place in the user's model, what enters or leaves one of its modules, and what passes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from fxshap.errors import InputError

Side = Literal["input", "output"]


@dataclass(frozen=True)
class HookPoint:
    """What enters or leaves one of the user's modules.

    Attributes
    ----------
    name : str
        The qualified name of the module; '' for the whole model.
    side : 'input' or 'output'
    """

    name: str
    side: Side

    def __str__(self) -> str:
        return f"the {self.side} of '{self.name}'" if self.name else f"the model's {self.side}"


@contextmanager
def record_tensors(model: nn.Module, place: HookPoint) -> Iterator[list[tuple[Tensor, ...]]]:
    """Note what passes a place: a copy of its tensors for every time that the module is called."""
    seen: list[tuple[Tensor, ...]] = []

    def note(values: Any) -> None:
        seen.append(tuple(x.clone() for x in floating_tensors(values)))  # before anything in place

    def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
        note((args, kwargs))

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        note(output)

    with register_hook(model, place, entering, leaving):
        yield seen


def register_hook(
    model: nn.Module, place: HookPoint, entering: Callable[..., Any], leaving: Callable[..., Any]
) -> RemovableHandle:
    """Hook a place with one of two functions: of arguments and keywords, or of the output."""
    module = model.get_submodule(place.name)
    if place.side == "input":
        return module.register_forward_pre_hook(entering, with_kwargs=True)
    return module.register_forward_hook(leaving)


def find_hook_point(model: nn.Module, layer: str | nn.Module, side: Side) -> HookPoint:
    """Return the place at a layer, given by name or itself.

    Raises
    ------
    InputError
        If the model has no such layer.
    """
    for name, module in model.named_modules():
        if layer == name or layer is module:
            return HookPoint(name, side)
    near = get_close_matches(str(layer), dict(model.named_modules()), n=3, cutoff=0.3)
    hint = f"; is it one of {', '.join(near)}?" if near else ""
    raise InputError(f"{type(model).__name__} has no module {str(layer)!r}{hint}")


def floating_tensors(values: Any) -> list[Tensor]:
    """Return the floating-point tensors among values, those given twice once."""
    leaves = pytree.tree_leaves(values)
    found = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.dim()]
    return list({id(x): x for x in found}.values())


def single_call(place: HookPoint, seen: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return what passed a place, which must have been passed once.

    Raises
    ------
    InputError
        If the module was not called, or several times, or without floating-point tensors.
    """
    if not seen:
        raise InputError(
            f"{place} cannot be explained: forward never calls this module. A container such as a "
            "ModuleList only holds modules, and some layers lend their weights to others; choose "
            "a module that is called"
        )
    if len(seen) > 1:
        raise InputError(
            f"{place} cannot be explained: forward calls this module {len(seen)} times, so there "
            "is no one such tensor; give each use a module of its own, or choose a module that is "
            "called once"
        )
    if not seen[0]:
        raise InputError(f"{place} cannot be explained: no floating-point tensor passes there")
    return seen[0]
