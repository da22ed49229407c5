"""The attribution libraries that are recognised, and by which of their modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fxshap._version import __version__


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
EXPLAINING = tuple(module for library in LIBRARIES.values() for module in library.asks)


#: The modules of all libraries whose hooks on the user's own modules serve one call and no longer.
TEMPORARY = (*EXPLAINING, *{library.layers for library in LIBRARIES.values()})


def module_of(function: Hook) -> str:
    """Return the name of the module in which a function was defined."""
    inner = getattr(function, "func", function)  # of a functools.partial
    return getattr(inner, "__module__", None) or ""


def is_from(module: str, packages: Sequence[str]) -> bool:
    """Say whether a module is one of these packages or inside one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def unknown_release(library: str, does: str) -> str:
    """Say that a library does what the release we know does not."""
    return (
        f"{library} {installed(library)} {does} that fxshap {__version__} knows, and would "
        "get ordinary gradients instead of attributions that add up; use a release of "
        f"{library} that fxshap supports, or, if it passes rows [samples; references], ask inside "
        "`with fxshap.multiplier_mode():`"
    )


def installed(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(of unknown version)"


def belongs_to_library(function: Hook) -> bool:
    """Say whether a function belongs to a library that explains by differences."""
    return is_from(module_of(function), EXPLAINING)


Hook = Callable[..., Any]
