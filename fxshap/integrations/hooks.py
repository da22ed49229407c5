"""The hooks that attribution libraries register on modules."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxshap.errors import InputError, RecognitionError
from fxshap.frontend.hook_point import HookPoint
from fxshap.integrations.libraries import (
    EXPLAINING,
    LIBRARIES,
    TEMPORARY,
    Hook,
    is_from,
    module_of,
    unknown_release,
)

#: A hook, by the identity of its table and its number there.
HookKey = tuple[int, int]


#: Tables of hooks on a module, with `forward` hooks last.
TABLES = ("_backward_hooks", "_backward_pre_hooks", "_forward_pre_hooks", "_forward_hooks")


@dataclass(frozen=True)
class LayerHook:
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

    place: HookPoint
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


def hooking_libraries(probe: nn.Module) -> list[str]:
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
            raise RecognitionError(unknown_release(name, does))
    return found


def remove_hooks(modules: Iterable[nn.Module], owners: Sequence[str] = EXPLAINING) -> None:
    """Remove hooks of libraries that ask; SHAP leaves its own behind when a call of it fails."""
    for module in modules:
        for table in TABLES:
            hooks = getattr(module, table)
            for key in [
                key for key, hook in list(hooks.items()) if is_from(module_of(hook), owners)
            ]:
                hooks.pop(key, None)
