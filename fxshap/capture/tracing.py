"""Contexts in which the user's model runs while torch.export records it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

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


# --- operators of our own -----------------------------------------------------------------------


class RecordOwnOperators(TorchFunctionMode):
    """Record some functions of PyTorch as one operator of :mod:`fxshap.ops.library` each.

    They are batch norm in evaluation mode, and the product of groups of rows. A sum by
    ``scatter_reduce``, whose strides torch does not know, is recorded as ``scatter_add``.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in GROUPED_PRODUCTS:
            return grouped_mm_as_operator(func, *args, **kwargs)
        if func in SUMS:
            return sum_as_scatter_add(func, *args, **kwargs)
        if func in MASK_ARGUMENTS:
            return with_boolean_masks(func, args, kwargs)
        recorded = batch_norm_as_operator if func is functional.batch_norm else func
        return recorded(*args, **kwargs)


#: For functions that take masks, their position among the arguments.
MASK_ARGUMENTS = {torch.where: 0, Tensor.where: 1, Tensor.__getitem__: 1, Tensor.__setitem__: 1}


def with_boolean_masks(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Call a function with masks that are boolean: bytes are deprecated, and fail in a trace."""
    position, own = MASK_ARGUMENTS[function], list(args)
    if position < len(own):
        own[position] = pytree.tree_map_only(Tensor, bytes_as_boolean, own[position])
    if "condition" in kwargs:
        kwargs = {**kwargs, "condition": bytes_as_boolean(kwargs["condition"])}
    return function(*own, **kwargs)


def bytes_as_boolean(mask: Tensor) -> Tensor:
    """Return a mask of bytes as a boolean one, and any other tensor as it is."""
    return mask.bool() if mask.dtype is torch.uint8 else mask


#: For each function that reduces, the one that sums.
SUMS = {Tensor.scatter_reduce: Tensor.scatter_add, Tensor.scatter_reduce_: Tensor.scatter_add_}


def sum_as_scatter_add(
    function: Callable[..., Tensor],
    base: Tensor,
    dim: int,
    index: Tensor,
    src: Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> Tensor:
    """Compute ``scatter_reduce`` or its in-place form, a sum by ``scatter_add``."""
    if reduce == "sum" and include_self:
        return SUMS[function](base, dim, index, src)
    return function(base, dim, index, src, reduce, include_self=include_self)


#: They are missing from some releases.
GROUPED_PRODUCTS = tuple(
    getattr(module, name)
    for module, name in ((functional, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(module, name)
)


def grouped_mm_as_operator(
    function: Callable[..., Tensor],
    rows: Tensor,
    weights: Tensor,
    *rest: Any,
    offs: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Compute ``torch.nn.functional.grouped_mm``, with one matrix a group by our operator."""
    plain = not any(value is not None for value in (*rest, *options.values()))
    if plain and offs is not None and (rows.dim(), weights.dim()) == (2, 3):
        out: Tensor = torch.ops.fxshap.grouped_mm(rows, weights, offs)
        return out
    return function(rows, weights, *rest, offs=offs, **options)


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
