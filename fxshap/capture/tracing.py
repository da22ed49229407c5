"""Contexts in which the user's model runs while torch.export records it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fxshap._compat import deny_exporting

# --- TorchScript --------------------------------------------------------------------------------


@contextmanager
def trace_scripted_modules(model: nn.Module) -> Iterator[None]:
    """Have the operations of TorchScript modules recorded, rather than their Python source run.

    During an export a script method calls the Python method that it was compiled from, and
    torch 2.13 passes that one its module twice.
    """
    modules = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    methods = [module.forward for module in modules]
    for module, method in zip(modules, methods, strict=True):
        module.__dict__["forward"] = partial(call_as_not_exporting, method)
    try:
        yield
    finally:
        for module, method in zip(modules, methods, strict=True):
            module.__dict__["forward"] = method


def call_as_not_exporting(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method while ``torch.compiler.is_exporting()`` returns False."""
    with deny_exporting():
        return method(*args, **kwargs)


# --- batch norm ---------------------------------------------------------------------------------


class RecordBatchNorms(TorchFunctionMode):
    """Record every batch norm in evaluation mode as one ``fxshap::batch_norm`` operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        recorded = batch_norm_as_operator if func is functional.batch_norm else func
        return recorded(*args, **(kwargs or {}))


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
    """Compute ``torch.nn.functional.batch_norm``, in evaluation mode by ``fxshap::batch_norm``."""
    if training:
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    out: Tensor = torch.ops.fxshap.batch_norm(input, weight, bias, running_mean, running_var, eps)
    return out
