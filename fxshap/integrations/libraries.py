"""The attribution libraries that fxshap recognises, and the modules by which it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fxshap._version import __version__

#: A function that a library registers on a module.
Hook = Callable[..., Any]


@dataclass(frozen=True)
class Library:
    """The modules of one attribution library, by the kind of hooks that they register.

    Attributes
    ----------
    explaining_modules : tuple of str
        Modules that request multipliers. They register hooks on the probe, and are on the stack
        when the library calls the model.
    gradient_modules : tuple of str
        Modules that register hooks for methods that use ordinary gradients.
    layer_modules : tuple of str
        Modules that register a hook on one of the user's own modules, to explain that layer.
    """

    explaining_modules: tuple[str, ...]
    gradient_modules: tuple[str, ...] = ()
    layer_modules: tuple[str, ...] = ()


LIBRARIES = {
    "shap": Library(
        explaining_modules=("shap.explainers._deep",), layer_modules=("shap.explainers._deep",)
    ),
    "captum": Library(
        explaining_modules=(
            "captum.attr._core.deep_lift",
            "captum.attr._core.layer.layer_deep_lift",
            "captum.attr._core.neuron.neuron_deep_lift",
        ),
        gradient_modules=(
            "captum._utils",
            "captum.attr._core.guided_backprop_deconvnet",
            "captum.attr._core.lrp",
        ),
        layer_modules=("captum._utils.gradient",),
    ),
    "tangermeme": Library(explaining_modules=("tangermeme.deep_lift_shap", "tangermeme.pisa")),
}

#: The modules of all libraries that request multipliers.
EXPLAINING_MODULES = tuple(
    module for library in LIBRARIES.values() for module in library.explaining_modules
)

#: The modules of all libraries whose hooks on the user's own modules are for a single call.
SINGLE_CALL_MODULES = (
    *EXPLAINING_MODULES,
    *(module for library in LIBRARIES.values() for module in library.layer_modules),
)


def is_from(module: str, packages: Sequence[str]) -> bool:
    """Return True if a module is one of these packages or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def defining_module(function: Hook) -> str:
    """Return the name of the module that defines a function or a ``functools.partial`` of one."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__module__", None) or ""


def belongs_to_library(function: Hook) -> bool:
    """Return True if a function is defined in a module that requests multipliers."""
    return is_from(defining_module(function), EXPLAINING_MODULES)


def unknown_release_message(library: str, difference: str) -> str:
    """Return the message for a library that does not behave as its supported releases do."""
    return (
        f"{library} {installed_version(library)} {difference} that fxshap {__version__} knows, and "
        "would get ordinary gradients instead of attributions that add up; use a release of "
        f"{library} that fxshap supports, or, if it passes rows [samples; references], call it "
        "inside `with fxshap.multiplier_mode():`"
    )


def installed_version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(of unknown version)"
