"""The hooks that attribution libraries register on modules: finding, calling and removing them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxshap.errors import InputError, RecognitionError
from fxshap.frontend.hook_point import HookPoint
from fxshap.integrations.libraries import (
    EXPLAINING_MODULES,
    LIBRARIES,
    SINGLE_CALL_MODULES,
    Hook,
    defining_module,
    is_from,
    unknown_release_message,
)
from fxshap.integrations.stack import enclosing_frames, frame_module

#: A registered hook, by the identity of its table and its number in the table.
HookKey = tuple[int, int]

#: A module's tables of hooks.
TABLES = ("_backward_hooks", "_backward_pre_hooks", "_forward_pre_hooks", "_forward_hooks")


# --- registered hooks ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RegisteredHook:
    """A hook that is registered on a module.

    Attributes
    ----------
    module : nn.Module
    table : str
        The name of the module's table of hooks that it is in.
    number : int
        Its number in the table. PyTorch gives every hook of a process a number of its own.
    function : callable
    """

    module: nn.Module
    table: str
    number: int
    function: Hook

    @property
    def hooks(self) -> dict[int, Hook]:
        """The table of hooks that it is in."""
        hooks: dict[int, Hook] = getattr(self.module, self.table)
        return hooks

    @property
    def key(self) -> HookKey:
        """The identity of the table, and the number in it."""
        return id(self.hooks), self.number

    def is_from(self, packages: Sequence[str]) -> bool:
        """Return True if the function is defined in one of these packages."""
        return is_from(defining_module(self.function), packages)

    def remove(self) -> None:
        """Remove the hook from its module, unless another thread has done so already."""
        self.hooks.pop(self.number, None)


def registered_hooks(module: nn.Module) -> Iterator[RegisteredHook]:
    """Iterate over the hooks on a module; they may be removed meanwhile."""
    for table in TABLES:
        if hooks := getattr(module, table):
            for number, function in list(hooks.items()):
                yield RegisteredHook(module, table, number, function)


def hook_keys(module: nn.Module) -> tuple[HookKey, ...]:
    """Return the keys of the hooks on a module. A hook that is registered again has a new key."""
    return tuple(hook.key for hook in registered_hooks(module))


def remove_hooks(
    modules: Iterable[nn.Module],
    packages: Sequence[str] = EXPLAINING_MODULES,
    keep: Collection[HookKey] = (),
) -> None:
    """Remove the hooks of some packages, by default of those that request multipliers.

    Hooks whose keys are in `keep` stay.
    """
    for module in modules:
        for hook in registered_hooks(module):
            if hook.is_from(packages) and hook.key not in keep:
                hook.remove()


def hooking_libraries(probe: nn.Module) -> list[str]:
    """Return the libraries that have registered hooks on the probe to request multipliers.

    Raises
    ------
    RecognitionError
        If a library has registered hooks from an unknown module; they are removed.
    """
    origins = dict.fromkeys(defining_module(hook.function) for hook in registered_hooks(probe))
    requesting = []
    for name, library in LIBRARIES.items():
        own = [module for module in origins if is_from(module, (name,))]
        unknown = [module for module in own if not is_from(module, library.gradient_modules)]
        if any(is_from(module, library.explaining_modules) for module in own):
            requesting.append(name)
        elif unknown:
            remove_hooks([probe], (name,))
            difference = f"has hooked this model from {unknown[0]}, which is not among the modules"
            raise RecognitionError(unknown_release_message(name, difference))
    return requesting


# --- requests about a layer ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerHook:
    """A library's hook on one of the user's modules, by which it explains that layer.

    Attributes
    ----------
    hook_point : HookPoint
    hook : RegisteredHook
    """

    hook_point: HookPoint
    hook: RegisteredHook

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Unregister the hook for a while, so that it is not called while the model is captured."""
        hooks, number = self.hook.hooks, self.hook.number
        later = [key for key in hooks if key > number]
        self.hook.remove()
        try:
            yield
        finally:  # another thread may have registered or removed hooks meanwhile
            hooks[number] = self.hook.function
            hooks.update({key: hooks.pop(key) for key in later if key in hooks})

    def call_hook(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Call the hook as the module would, and return the tensors that replace `tensors`.

        Parameters
        ----------
        tensors : sequence of Tensor
            What enters or leaves the module.

        Raises
        ------
        InputError
            If the library would differentiate the layer instead of the model.
        """
        values, module, function = tuple(tensors), self.hook.module, self.hook.function
        if self.hook.table == "_forward_pre_hooks":
            result = function(module, values)
        elif self.hook_point.side == "input":  # SHAP's hook keeps the input and returns None
            result = function(module, values, None) or values
        else:
            result = function(module, (), values[0] if len(values) == 1 else values)
        if result is None:
            raise InputError(
                f"the library requests the gradient of {self.hook_point} itself, as Captum's "
                "neuron methods do; explain a model that ends there, with the neurons as its "
                "outputs"
            )
        return (result,) if isinstance(result, Tensor) else tuple(result)


# --- hooks that failed calls left behind --------------------------------------------------------


def remove_stale_hooks(explainable: nn.Module, model: nn.Module) -> None:
    """Remove the hooks that failed calls of attribution libraries left on the user's modules.

    Hooks that a running call of any thread has registered stay.

    Parameters
    ----------
    explainable : nn.Module
        The explainable model.
    model : nn.Module
        The user's model.
    """
    if torch.compiler.is_compiling():
        return
    hooks = [
        hook
        for module in model.modules()
        for hook in registered_hooks(module)
        if hook.is_from(SINGLE_CALL_MODULES)
    ]
    if not hooks:
        return
    live = live_hooks(sys._current_frames().values(), explainable)
    for hook in hooks:
        if hook.key not in live:
            hook.remove()
            if hook.is_from(LIBRARIES["shap"].explaining_modules):
                delete_interim_values(hook.module)


def delete_interim_values(module: nn.Module) -> None:
    """Delete the parameters `x` and `y` and the attribute that SHAP's hooks add to a module.

    SHAP adds the parameters to modules of PyTorch. Those of a module of the user's are its own.
    """
    if type(module).__module__.startswith("torch.nn."):
        for name in ("x", "y"):
            module._parameters.pop(name, None)
    module.__dict__.pop("target_input", None)


def live_hooks(
    frames: Iterable[FrameType | None], explainable: nn.Module | None = None
) -> set[HookKey]:
    """Return the keys of the hooks that running calls of attribution libraries have registered.

    Parameters
    ----------
    frames : iterable of FrameType
        The innermost frame of each thread to look at.
    explainable : nn.Module, optional
        An explainable model. A call of tangermeme on it hooks none of the user's own modules.
    """
    return {
        (id(handle.hooks_dict_ref()), handle.id)
        for innermost in frames
        for frame in enclosing_frames(innermost)
        if is_from(frame_module(frame), tuple(LIBRARIES))
        for handle in held_handles(frame, explainable)
    }


def held_handles(frame: FrameType, explainable: nn.Module | None) -> Iterator[RemovableHandle]:
    """Iterate over the handles of hooks that the function of a frame holds.

    SHAP and Captum hold them in local variables, in attributes of ``self``, or in lists there;
    tangermeme in a list on every module of its ``model``.
    """
    local = dict(frame.f_locals)
    candidates: list[Any] = [*local.values(), *getattr(local.get("self"), "__dict__", {}).values()]
    model = local.get("model")
    if isinstance(model, nn.Module) and model is not explainable:
        candidates += [vars(module).get("handles") for module in model.modules()]
    for candidate in candidates:
        for value in candidate if isinstance(candidate, list | tuple) else (candidate,):
            if isinstance(value, RemovableHandle):
                yield value
