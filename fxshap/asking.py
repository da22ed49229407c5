"""Which attribution library is asking, told by the marks it leaves on a module that is never run.

A library that explains by differences hooks the nonlinear modules of a model, calls it with rows
``[samples; references]``, and removes its hooks. The explainable model owns one such module for
this purpose, the probe. Hooks may also be left over from a call that failed, and a release of
tomorrow may hook in another way; so the stack says whether the library is really at work, and where
marks and stack disagree there is an error, never an ordinary gradient in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.errors import RecognitionError

Hook = Callable[..., Any]

#: Tables of hooks on a module, with `forward` hooks last.
TABLES = ("_backward_hooks", "_backward_pre_hooks", "_forward_pre_hooks", "_forward_hooks")


@dataclass(frozen=True)
class Library:
    """How to know one library.

    Attributes
    ----------
    asks : tuple of str
        The modules of the library that ask for multipliers: they hook the probe, and stand on the
        stack when they call the model.
    gradients : tuple of str
        Its modules that hook for methods of ordinary gradients.
    layers : str
        Its module that hooks one of the user's own modules to ask about a layer.
    """

    asks: tuple[str, ...]
    gradients: tuple[str, ...] = ()
    layers: str = "nothing"


LIBRARIES = {
    "shap": Library(asks=("shap.explainers._deep",), layers="shap.explainers._deep"),
    "captum": Library(
        asks=(
            "captum.attr._core.deep_lift",
            "captum.attr._core.layer.layer_deep_lift",
            "captum.attr._core.neuron.neuron_deep_lift",
        ),
        gradients=(
            "captum._utils",
            "captum.attr._core.guided_backprop_deconvnet",
            "captum.attr._core.lrp",
        ),
        layers="captum._utils.gradient",
    ),
    "tangermeme": Library(asks=("tangermeme.deep_lift_shap", "tangermeme.pisa")),
}

#: What the mode is called while :func:`paired` is on.
PAIRED = "paired"

_paired: ContextVar[bool] = ContextVar("fxshap.paired", default=False)


@contextmanager
def paired() -> Iterator[None]:
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
    >>> with fxshap.paired():
    ...     outputs = explainable(rows)
    >>> multipliers, _ = torch.autograd.grad(outputs.sum(), rows)[0].chunk(2)
    >>> f_x, f_r = outputs.detach().chunk(2)
    >>> torch.allclose((multipliers * (samples - references)).sum(1), (f_x - f_r)[:, 0], atol=1e-6)
    True
    """
    token = _paired.set(True)
    try:
        yield
    finally:
        _paired.reset(token)


def asker(probe: nn.Module, inputs: Sequence[Any]) -> str | None:
    """Return who asks for multipliers of these inputs, if anyone: a library's name or 'paired'.

    Parameters
    ----------
    probe : nn.Module
        The module that is never run.
    inputs : sequence
        Everything that the explainable model is called with.

    Raises
    ------
    RecognitionError
        If a library that explains by differences is calling but has left no mark that we know, or
        has left marks that we do not know.
    """
    if not (torch.is_grad_enabled() and any(map(needs_gradient, inputs))):
        return None
    if _paired.get():
        return PAIRED
    marked, calling = hooked_by(probe), caller()
    if calling and calling not in marked:
        raise RecognitionError(strange(calling, "calls this model without the hooks"))
    return calling


def needs_gradient(value: Any) -> bool:
    """Say whether a value is a tensor whose gradient is recorded."""
    return isinstance(value, Tensor) and value.requires_grad


def mode(probe: nn.Module) -> str:
    """Return who has prepared a model to ask it: a library's name, 'paired' or 'plain'."""
    return PAIRED if _paired.get() else next(iter(hooked_by(probe)), "plain")


def hooked_by(probe: nn.Module) -> set[str]:
    """Return the libraries that have hooked the probe to ask for multipliers."""
    modules = {module_of(hook) for table in TABLES for hook in getattr(probe, table).values()}
    found = {name for name in LIBRARIES if any(is_from(m, LIBRARIES[name].asks) for m in modules)}
    for name in LIBRARIES.keys() - found:
        known = LIBRARIES[name].gradients
        unknown = [m for m in modules if is_from(m, (name,)) and not is_from(m, known)]
        if unknown:
            remove_hooks([probe])
            raise RecognitionError(strange(name, f"has hooked this model from {unknown[0]}, not"))
    return found


def caller() -> str | None:
    """Return the library that is calling us for an explanation by differences, if one is."""
    if torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        for name, library in LIBRARIES.items():
            if is_from(module, library.asks):
                return name
        frame = frame.f_back
    return None


def works_for(function: Hook) -> bool:
    """Say whether a function belongs to a library that explains by differences."""
    return any(is_from(module_of(function), library.asks) for library in LIBRARIES.values())


def hooks_on(module: nn.Module) -> tuple[int, ...]:
    """Return the numbers of the hooks on a module; no two hooks ever have the same."""
    return tuple(key for table in TABLES for key in getattr(module, table))


def remove_hooks(modules: Sequence[nn.Module]) -> None:
    """Remove hooks of libraries that ask; SHAP leaves its own behind when a call of it fails."""
    for module in modules:
        for table in TABLES:
            hooks = getattr(module, table)
            for key in [key for key, hook in hooks.items() if works_for(hook)]:
                del hooks[key]


def module_of(function: Hook) -> str:
    """Return the name of the module in which a function was defined."""
    inner = getattr(function, "func", function)  # of a functools.partial
    return getattr(inner, "__module__", None) or ""


def is_from(module: str, packages: Sequence[str]) -> bool:
    """Say whether a module is one of these packages or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def strange(library: str, does: str) -> str:
    """Say that a library does what the release we know does not."""
    return (
        f"{library} {installed(library)} {does} that fxshap {installed('fxshap')} knows, and would "
        "get ordinary gradients instead of attributions that add up; use a release of "
        f"{library} that fxshap supports, or, if it passes rows [samples; references], ask inside "
        "`with fxshap.paired():`"
    )


def installed(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(of unknown version)"
