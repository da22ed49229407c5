"""Which attribution library is calling an explainable model, and what it requests.

A library that computes DeepLIFT attributions registers hooks on the nonlinear modules of a model,
calls it with rows ``[samples; references]``, and removes its hooks. The explainable model owns one
such module, the probe. The library finds and hooks it; it is never run. Hooks on the probe are not
proof enough: a call that failed may have left them behind, and a future release may register none.
So the call stack is consulted too. Where the library is on the stack and its hooks are missing or
unknown, fxshap raises an error, and never returns ordinary gradients in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.errors import RecognitionError
from fxshap.frontend.hook_point import HookPoint, Side
from fxshap.integrations.hooks import (
    LayerHook,
    RegisteredHook,
    hook_keys,
    hooking_libraries,
    live_hooks,
    registered_hooks,
)
from fxshap.integrations.libraries import LIBRARIES, is_from, unknown_release_message
from fxshap.integrations.stack import enclosing_frames, frame_module

#: The value of :func:`active_library` inside :func:`multiplier_mode`.
MULTIPLIER_MODE = "multiplier_mode"

#: The tables of hooks that are called as the model runs.
FORWARD_TABLES = ("_forward_pre_hooks", "_forward_hooks")

_multiplier_mode: ContextVar[bool] = ContextVar("fxshap.multiplier_mode", default=False)


@contextmanager
def multiplier_mode() -> Iterator[None]:
    """Have explainable models read their rows as ``[samples; references]``, whoever calls them.

    SHAP, Captum and tangermeme are recognised without it. It is for code of your own, and for
    libraries that fxshap does not know. Inside it, the gradient of an explainable model with
    respect to an input that requires one is the multiplier of the pair: of row i of the samples
    with row i of the references. Both rows of a pair get the same multiplier. Calls that record no
    gradient return the model's ordinary output.

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
    layer : LayerHook or None
        The hook of the layer that is explained; ``None`` for the model's own inputs.
    """

    layer: LayerHook | None = None


def find_request(probe: nn.Module, model: nn.Module, inputs: Sequence[Any]) -> Request | None:
    """Return what a call of an explainable model requests; ``None`` if it is an ordinary call.

    Parameters
    ----------
    probe : nn.Module
        The module that libraries hook and that is never run.
    model : nn.Module
        The user's model.
    inputs : sequence
        Every argument of the call.

    Returns
    -------
    Request or None

    Raises
    ------
    RecognitionError
        If a library that computes DeepLIFT attributions is calling without hooks on the probe, or
        with hooks from an unknown module.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        check_gradients_recorded(probe, inputs)
        return None
    records_gradient, library = any(map(needs_gradient, inputs)), calling_library()
    layer = requested_layer(model, library) if library else None
    if not records_gradient and layer is None:
        return None
    if _multiplier_mode.get():
        return Request(layer)
    requesting = hooking_libraries(probe)
    if library is None:
        return None  # hooks on the probe are then those of a call that failed
    if library not in requesting:
        raise RecognitionError(
            unknown_release_message(library, "calls this model without the hooks")
        )
    return Request(layer)


def check_gradients_recorded(probe: nn.Module, inputs: Sequence[Any]) -> None:
    """Raise a RecognitionError if a library requests multipliers where no gradient is recorded."""
    # Libraries require a gradient of their inputs, but in inference mode copies of them lose it.
    if not (torch.is_inference_mode_enabled() or any(map(needs_gradient, inputs))):
        return
    live = live_hooks([sys._getframe(1)])
    if calling_library() and not live.isdisjoint(hook_keys(probe)):
        mode = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
        raise RecognitionError(unrecorded_message(mode))


def check_recording() -> None:
    """Raise a RecognitionError in inference mode, in which no gradient can be recorded."""
    if torch.is_inference_mode_enabled():
        raise RecognitionError(unrecorded_message("inference_mode"))


def unrecorded_message(mode: str) -> str:
    """Return the message for an explanation where no gradient is recorded."""
    return (
        f"the explanation is computed inside torch.{mode}(), where no gradient is recorded, and "
        f"attributions are gradients; leave `with torch.{mode}():` (or set_grad_enabled) before "
        "you explain"
    )


def needs_gradient(value: Any) -> bool:
    """Return True if a value is a tensor whose gradient is recorded."""
    return isinstance(value, Tensor) and value.requires_grad


def active_library(probe: nn.Module) -> str:
    """Return the library whose hooks are on the probe, 'multiplier_mode' inside it, or 'plain'."""
    if _multiplier_mode.get():
        return MULTIPLIER_MODE
    return next(iter(hooking_libraries(probe)), "plain")


def calling_library(directly: bool = False) -> str | None:
    """Return the library on the call stack that requests multipliers, if there is one.

    Parameters
    ----------
    directly : bool
        Whether the library must be what calls the explainable model.
    """
    if torch.compiler.is_compiling():
        return None
    passed = ("fxshap", "torch.nn.modules.module", *LIBRARIES)
    for frame in enclosing_frames(sys._getframe(1)):
        module = frame_module(frame)
        for name, library in LIBRARIES.items():
            if is_from(module, library.explaining_modules):
                return name
        if directly and not is_from(module, passed):
            return None
    return None


def counted_outputs() -> int | None:
    """Return how many outputs the explainer of SHAP counted that is running, if one is."""
    for frame in enclosing_frames(sys._getframe(1)):
        if is_from(frame_module(frame), LIBRARIES["shap"].explaining_modules):
            return getattr(frame.f_locals.get("self"), "num_outputs", None)
    return None


def requested_layer(model: nn.Module, library: str) -> LayerHook | None:
    """Return a library's hook on the layer of the user's model that it explains, if any.

    Only a hook that the running call has registered counts. One that an earlier call left behind
    requests nothing.
    """
    packages = LIBRARIES[library].layer_modules
    live = live_hooks([sys._getframe(1)])
    for name, module in model.named_modules():
        for hook in registered_hooks(module):
            if hook.table in FORWARD_TABLES and hook.key in live and hook.is_from(packages):
                return LayerHook(HookPoint(name, explained_side(hook, library)), hook)
    return None


def explained_side(hook: RegisteredHook, library: str) -> Side:
    """Return the side of a layer that a library explains by a hook on it.

    Captum registers a forward hook for the output and a forward pre-hook for the input. SHAP
    explains the input, which its forward hook keeps.
    """
    return "output" if library == "captum" and hook.table == "_forward_hooks" else "input"
