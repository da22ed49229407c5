"""Points in the user's model where a hook sees tensors: the input or the output of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from fxshap.errors import InputError
from fxshap.ops.dtypes import is_floating

Side = Literal["input", "output"]


@dataclass(frozen=True)
class HookPoint:
    """The input or the output of one of the user's modules.

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


def find_hook_point(model: nn.Module, layer: str | nn.Module, side: Side) -> HookPoint:
    """Return the hook point of a layer, which is given by its qualified name or as a module.

    Raises
    ------
    InputError
        If the model has no such layer.
    """
    for name, module in model.named_modules():
        if layer == name or layer is module:
            return HookPoint(name, side)
    similar = get_close_matches(str(layer), dict(model.named_modules()), n=3, cutoff=0.3)
    hint = f"; is it one of {', '.join(similar)}?" if similar else ""
    raise InputError(f"{type(model).__name__} has no module {str(layer)!r}{hint}")


def register_hook(
    model: nn.Module,
    hook_point: HookPoint,
    input_hook: Callable[..., Any],
    output_hook: Callable[..., Any],
) -> RemovableHandle:
    """Register one of two hooks at a hook point, by its side, for calls of this thread.

    Parameters
    ----------
    model : nn.Module
    hook_point : HookPoint
    input_hook : callable
        Takes the module, its positional and its keyword arguments.
    output_hook : callable
        Takes the module, its positional arguments and its output.
    """
    module = model.get_submodule(hook_point.name)
    if hook_point.side == "input":
        return module.register_forward_pre_hook(in_this_thread(input_hook), with_kwargs=True)
    return module.register_forward_hook(in_this_thread(output_hook))


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that does nothing in other threads, which may call the same module."""
    if torch.compiler.is_dynamo_compiling():  # strict export, which runs one thread
        return hook
    thread = get_ident()

    def guarded(*args: Any) -> Any:
        return hook(*args) if get_ident() == thread else None

    return guarded


@contextmanager
def record_tensors(model: nn.Module, hook_point: HookPoint) -> Iterator[list[tuple[Tensor, ...]]]:
    """Record copies of the tensors at a hook point, in one tuple for every call of the module."""
    calls: list[tuple[Tensor, ...]] = []

    def record(values: Any) -> None:
        # Copies, because a later operation may change the tensors in place.
        calls.append(tuple(x.clone() for x in floating_tensors(values)))

    def input_hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        record((args, kwargs))

    def output_hook(module: nn.Module, args: Any, output: Any) -> None:
        record(output)

    with register_hook(model, hook_point, input_hook, output_hook):
        yield calls


def floating_tensors(values: Any) -> list[Tensor]:
    """Return the floating-point tensors with dimensions in nested values, each of them once."""
    tensors = [x for x in pytree.tree_leaves(values) if is_floating(x) and x.dim()]
    return list({id(x): x for x in tensors}.values())


def single_call(hook_point: HookPoint, calls: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return the tensors of the only call of a module.

    Raises
    ------
    InputError
        If the module was not called, or several times, or without floating-point tensors.
    """
    if not calls:
        raise InputError(
            f"{hook_point} cannot be explained: forward never calls this module. A container such "
            "as a ModuleList only holds modules, and some layers lend their weights to others; "
            "choose a module that is called"
        )
    if len(calls) > 1:
        raise InputError(
            f"{hook_point} cannot be explained: forward calls this module {len(calls)} times, so "
            "it has several such tensors; give each use a module of its own, or choose a module "
            "that is called once"
        )
    if not calls[0]:
        raise InputError(f"{hook_point} cannot be explained: it has no floating-point tensor")
    return calls[0]
