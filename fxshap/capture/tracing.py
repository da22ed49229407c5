"""Contexts in which the model runs while it is exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@contextmanager
def trace_scripted_modules(model: nn.Module) -> Iterator[None]:
    """Let the operations of TorchScript modules be traced, not their Python sources.

    A script method that finds itself exported calls the method that it was made of instead, and
    torch 2.13 gives that one its module twice.
    """
    found = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    methods = [module.forward for module in found]
    for module, method in zip(found, methods, strict=True):
        module.__dict__["forward"] = partial(call_as_not_exporting, method)
    try:
        yield
    finally:
        for module, method in zip(found, methods, strict=True):
            module.__dict__["forward"] = method


def call_as_not_exporting(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method while ``torch.compiler.is_exporting()`` denies it."""
    exporting = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = False
    try:
        return method(*args, **kwargs)
    finally:
        torch.compiler._is_exporting_flag = exporting


class RecordBatchNorms(TorchFunctionMode):
    """Record batch norms in evaluation mode as the operation above."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        stands_in = batch_norm_as_operator if func is functional.batch_norm else func
        return stands_in(*args, **(kwargs or {}))


def batch_norm_as_operator(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Stand in for ``torch.nn.functional.batch_norm``."""
    if training:
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    out: Tensor = torch.ops.fxshap.batch_norm(input, weight, bias, running_mean, running_var, eps)
    return out
