"""Which attribution library is asking, told by the marks it leaves on a module that is never run.

A library that explains by differences hooks the nonlinear modules of a model, calls it with rows
``[samples; references]``, and removes its hooks. The explainable model owns one such module for
this purpose, the probe. Hooks may also be left over from a call that failed, and a release of
tomorrow may hook in another way; so the stack says whether the library is really at work, and where
marks and stack disagree there is an error, never an ordinary gradient in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.errors import RecognitionError
from fxshap.frontend.hook_point import HookPoint
from fxshap.integrations.hooks import LayerHook, hooking_libraries, live_hooks
from fxshap.integrations.libraries import (
    LIBRARIES,
    is_from,
    module_of,
    unknown_release,
)

#: What the mode is called while :func:`paired` is on.
MULTIPLIER_MODE = "paired"

_multiplier_mode: ContextVar[bool] = ContextVar("fxshap.multiplier_mode", default=False)


@contextmanager
def multiplier_mode() -> Iterator[None]:
    """Have explainable models take rows as ``[samples; references]``, whoever calls.

    SHAP, Captum and tangermeme are recognised without it; this is for code of your own, or for a
    library that fxshap has not met. Within it, the gradient of an explainable model with respect to
    an input that requires one is the multiplier of the pair: row i of the samples with row i of the
    references. Both rows of a pair get it. Calls that record no gradient stay plain.

    Examples
    --------
    >>> import torch, fxshap
    >>> explainable = fxshap.make_explainable(torch.nn.Sequential(torch.nn.Linear(4, 1),
    ...     torch.nn.GELU()))
    >>> samples, references = torch.randn(3, 4), torch.zeros(3, 4)
    >>> rows = torch.cat([samples, references]).requires_grad_()
    >>> with fxshap.multiplier_mode():
    ...     outputs = explainable(rows)
    >>> multipliers, _ = torch.autograd.grad(outputs.sum(), rows)[0].chunk(2)
    >>> f_x, f_r = outputs.detach().chunk(2)
    >>> torch.allclose((multipliers * (samples - references)).sum(1), (f_x - f_r)[:, 0], atol=1e-6)
    True
    """
    token = _multiplier_mode.set(True)
    try:
        yield
    finally:
        _multiplier_mode.reset(token)


@dataclass(frozen=True)
class Request:
    """A request for multipliers.

    Attributes
    ----------
    layer : Layer or None
        The layer that is asked about; ``None`` for the model's own inputs.
    """

    layer: LayerHook | None = None


def find_request(probe: nn.Module, model: nn.Module, inputs: Sequence[Any]) -> Request | None:
    """Return what is asked by calling an explainable model; ``None`` for an ordinary call.

    Parameters
    ----------
    probe : nn.Module
        The module that is never run.
    model : nn.Module
        The user's model.
    inputs : sequence
        Everything that the explainable model is called with.

    Raises
    ------
    RecognitionError
        If a library that explains by differences is calling but has left no mark that we know, or
        has left marks that we do not know.
    """
    if not torch.is_grad_enabled():
        return None
    recorded, calling = any(map(needs_gradient, inputs)), calling_library()
    layer = requested_layer(model, calling) if calling else None
    if not recorded and layer is None:
        return None
    if _multiplier_mode.get():
        return Request(layer)
    marked = hooking_libraries(probe)
    if calling is None:
        return None  # the marks are left over from a call that failed
    if calling not in marked:
        raise RecognitionError(unknown_release(calling, "calls this model without the hooks"))
    return Request(layer)


def needs_gradient(value: Any) -> bool:
    """Say whether a value is a tensor whose gradient is recorded."""
    return isinstance(value, Tensor) and value.requires_grad


def active_library(probe: nn.Module) -> str:
    """Return who has prepared a model to ask it: a library's name, 'paired' or 'plain'."""
    return (
        MULTIPLIER_MODE if _multiplier_mode.get() else next(iter(hooking_libraries(probe)), "plain")
    )


def calling_library(directly: bool = False) -> str | None:
    """Return the library that is calling us for an explanation by differences, if one is.

    Parameters
    ----------
    directly : bool
        Whether to look no further than to who called the explainable model.
    """
    if torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        for name, library in LIBRARIES.items():
            if is_from(module, library.asks):
                return name
        if directly and not is_from(module, ("fxshap", "torch.nn.modules.module")):
            return None
        frame = frame.f_back
    return None


def requested_layer(model: nn.Module, library: str) -> LayerHook | None:
    """Return the layer of the user's model that a library asks about, if it does.

    Only a hook that the running call itself has registered counts: one that an earlier call left
    behind asks nothing.
    """
    live = live_hooks([sys._getframe(1)])
    for name, module in model.named_modules():
        for table in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(module, table)
            for key, hook in list(hooks.items()):
                theirs = is_from(module_of(hook), (LIBRARIES[library].layers,))
                if theirs and (id(hooks), key) in live:
                    output = library == "captum" and table == "_forward_hooks"
                    return LayerHook(
                        HookPoint(name, "output" if output else "input"), module, table, key
                    )
    return None
