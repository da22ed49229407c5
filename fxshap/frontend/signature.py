"""TorchScript modules: their parameters by name, and calls of them under a tracer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


def signature(model: nn.Module) -> inspect.Signature:
    """Return the signature of a model's ``forward``; a traced module tells only its schema."""
    try:
        return inspect.signature(model.forward)
    except ValueError:
        if not isinstance(model.forward, torch.ScriptMethod):
            raise
    _, *arguments = model.forward.schema.arguments
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value
                if argument.has_default_value()
                else inspect.Parameter.empty,
            )
            for argument in arguments
        ]
    )


@contextmanager
def running_scripts(model: nn.Module) -> Iterator[None]:
    """Let the operations of TorchScript modules be traced, not their Python sources.

    A script method that finds itself exported calls the method that it was made of instead, and
    torch 2.13 gives that one its module twice.
    """
    found = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    methods = [module.forward for module in found]
    for module, method in zip(found, methods, strict=True):
        module.__dict__["forward"] = partial(not_exporting, method)
    try:
        yield
    finally:
        for module, method in zip(found, methods, strict=True):
            module.__dict__["forward"] = method


def not_exporting(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method while ``torch.compiler.is_exporting()`` denies it."""
    exporting = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = False
    try:
        return method(*args, **kwargs)
    finally:
        torch.compiler._is_exporting_flag = exporting
