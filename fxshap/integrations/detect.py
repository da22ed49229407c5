"""Which attribution library is asking, told by the marks it leaves on a module that is never run.

A library that explains by differences hooks the nonlinear modules of a model, calls it with rows
``[samples; references]``, and removes its hooks. The explainable model owns one such module for
this purpose, the probe. Hooks may also be left over from a call that failed, and a release of
tomorrow may hook in another way; so the stack says whether the library is really at work, and where
marks and stack disagree there is an error, never an ordinary gradient in silence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import fxshap
from fxshap.errors import InputError, RecognitionError
from fxshap.frontend.hook_point import Place

Hook = Callable[..., Any]
#: A hook, by the identity of its table and its number there.
HookKey = tuple[int, int]

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

#: The modules of all libraries that ask for multipliers.
ASKING = tuple(module for library in LIBRARIES.values() for module in library.asks)

#: The modules of all libraries whose hooks on the user's own modules serve one call and no longer.
TEMPORARY = (*ASKING, *{library.layers for library in LIBRARIES.values()})

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


@dataclass(frozen=True)
class Layer:
    """A library's hook on one of the user's modules: a question about what passes there.

    Attributes
    ----------
    place : Place
    module : nn.Module
    table : str
        The table of hooks that it is in.
    key : int
        Its number there.
    """

    place: Place
    module: nn.Module
    table: str
    key: int

    @property
    def hooks(self) -> dict[int, Hook]:
        """The table of hooks."""
        hooks: dict[int, Hook] = getattr(self.module, self.table)
        return hooks

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Take the hook away for a while, so that it does not see how the model is captured."""
        kept = dict(self.hooks)
        del self.hooks[self.key]
        try:
            yield
        finally:
            self.hooks.clear()
            self.hooks.update(kept)

    def hand_over(self, passing: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Call the hook as the module would; return the tensors to go on with.

        Raises
        ------
        InputError
            If the library would differentiate the layer instead of the model.
        """
        entering, hook = tuple(passing), self.hooks[self.key]
        if self.table == "_forward_pre_hooks":
            result = hook(self.module, entering)
        elif self.place.side == "input":  # SHAP looks back at it
            result = hook(self.module, entering, None) or entering
        else:
            result = hook(self.module, (), entering[0] if len(entering) == 1 else entering)
        if result is None:
            raise InputError(
                f"{self.place} is asked for its own gradient (Captum's neuron methods); explain a "
                "model that ends there, with the neurons as its outputs"
            )
        return (result,) if isinstance(result, Tensor) else tuple(result)


@dataclass(frozen=True)
class Question:
    """A request for multipliers.

    Attributes
    ----------
    layer : Layer or None
        The layer that is asked about; ``None`` for the model's own inputs.
    """

    layer: Layer | None = None


def question(probe: nn.Module, model: nn.Module, inputs: Sequence[Any]) -> Question | None:
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
    recorded, calling = any(map(needs_gradient, inputs)), caller()
    layer = layer_asked(model, calling) if calling else None
    if not recorded and layer is None:
        return None
    if _paired.get():
        return Question(layer)
    marked = hooked_by(probe)
    if calling is None:
        return None  # the marks are left over from a call that failed
    if calling not in marked:
        raise RecognitionError(strange(calling, "calls this model without the hooks"))
    return Question(layer)


def needs_gradient(value: Any) -> bool:
    """Say whether a value is a tensor whose gradient is recorded."""
    return isinstance(value, Tensor) and value.requires_grad


def mode(probe: nn.Module) -> str:
    """Return who has prepared a model to ask it: a library's name, 'paired' or 'plain'."""
    return PAIRED if _paired.get() else next(iter(hooked_by(probe)), "plain")


def hooked_by(probe: nn.Module) -> list[str]:
    """Return the libraries that have hooked the probe to ask for multipliers.

    Raises
    ------
    RecognitionError
        If one of them has hooked it in a way that we do not know; its hooks are removed.
    """
    modules = {module_of(hook) for table in TABLES for hook in getattr(probe, table).values()}
    found = []
    for name, library in LIBRARIES.items():
        theirs = [module for module in modules if is_from(module, (name,))]
        if any(is_from(module, library.asks) for module in theirs):
            found.append(name)
        elif strangers := [m for m in theirs if not is_from(m, library.gradients)]:
            remove_hooks([probe], (name,))
            does = f"has hooked this model from {strangers[0]}, which is not among the modules"
            raise RecognitionError(strange(name, does))
    return found


def caller(directly: bool = False) -> str | None:
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


def layer_asked(model: nn.Module, library: str) -> Layer | None:
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
                    return Layer(Place(name, "output" if output else "input"), module, table, key)
    return None


def live_hooks(frames: Iterable[FrameType | None], but: nn.Module | None = None) -> set[HookKey]:
    """Return the hooks that calls of attribution libraries hold handles of, now on the stack.

    Parameters
    ----------
    frames : iterable of FrameType
        The innermost frame of each thread to look at.
    but : nn.Module, optional
        An explainable model. A tangermeme call on it hooks none of the user's own modules.
    """
    live: set[HookKey] = set()
    for frame in frames:
        while frame is not None:
            if is_from(str(frame.f_globals.get("__name__", "")), tuple(LIBRARIES)):
                values = dict(frame.f_locals)
                model = values.get("model")
                if isinstance(model, nn.Module) and model is not but:
                    values["on modules"] = [
                        handle
                        for module in model.modules()
                        for handle in vars(module).get("handles", ())
                    ]
                for value in (
                    *values.values(),
                    *getattr(values.get("self"), "__dict__", {}).values(),
                ):
                    for handle in value if isinstance(value, list | tuple) else (value,):
                        if isinstance(handle, RemovableHandle):
                            live.add((id(handle.hooks_dict_ref()), handle.id))
            frame = frame.f_back
    return live


def clear_stale(explainable: nn.Module, model: nn.Module) -> None:
    """Remove what calls of attribution libraries that failed have left on the user's modules.

    Parameters
    ----------
    explainable : nn.Module
        The explainable model.
    model : nn.Module
        The user's model. Hooks that a running call of any thread has registered stay.
    """
    if torch.compiler.is_compiling():
        return
    found = [
        (module, hooks, key, hook)
        for module in model.modules()
        for table in TABLES
        if (hooks := getattr(module, table))
        for key, hook in list(hooks.items())
        if is_from(module_of(hook), TEMPORARY)
    ]
    if not found:
        return
    live = live_hooks(sys._current_frames().values(), but=explainable)
    for module, hooks, key, hook in found:
        if (id(hooks), key) in live:
            continue
        hooks.pop(key, None)
        if is_from(module_of(hook), LIBRARIES["shap"].asks):
            drop_interim_values(module)


def drop_interim_values(module: nn.Module) -> None:
    """Delete the parameters `x` and `y` that SHAP adds to a module, and what it saw enter it."""
    for name in ("x", "y"):
        module._parameters.pop(name, None)
    module.__dict__.pop("target_input", None)


def hooks_on(module: nn.Module) -> tuple[int, ...]:
    """Return the numbers of the hooks on a module; no two hooks ever have the same."""
    return tuple(key for table in TABLES for key in getattr(module, table))


def works_for(function: Hook) -> bool:
    """Say whether a function belongs to a library that explains by differences."""
    return is_from(module_of(function), ASKING)


def remove_hooks(modules: Iterable[nn.Module], owners: Sequence[str] = ASKING) -> None:
    """Remove hooks of libraries that ask; SHAP leaves its own behind when a call of it fails."""
    for module in modules:
        for table in TABLES:
            hooks = getattr(module, table)
            for key in [
                key for key, hook in list(hooks.items()) if is_from(module_of(hook), owners)
            ]:
                hooks.pop(key, None)


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
        f"{library} {installed(library)} {does} that fxshap {fxshap.__version__} knows, and would "
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
