"""The settings of a model: what its ``forward`` reads besides tensors, and users change.

These are Python attributes such as ``model.temperature = 2.0``, hooks, and an assigned ``forward``.
A graph has them as they were during the capture. What ``forward`` itself assigns, such as a counter
or a hidden state, is the state of the model, and most of it changes no output.
"""

from __future__ import annotations

import argparse
from collections.abc import Set
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fxshap.frontend.arguments import SameObject
from fxshap.state import COMMON_ATTRIBUTES, Attribute

#: The largest container whose elements are compared. A larger one is compared by its identity.
MAX_ELEMENTS = 1000

#: Types whose values are compared by equality.
PLAIN = frozenset(
    (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
)


def settings_of(model: nn.Module, state: Set[Attribute]) -> tuple[Any, ...]:
    """Return what is equal as long as nobody changes the settings of a model.

    Parameters
    ----------
    model : nn.Module
    state : set of (nn.Module, str)
        The attributes that ``forward`` itself assigns.
    """
    settings: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if name in COMMON_ATTRIBUTES or (state and (module, name) in state):
                continue
            kind = type(value)
            settings.append((name, kind, value if kind in PLAIN else setting_key(value)))
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            settings += map(SameObject, hooks.values())
    return tuple(settings)


def state_of(state: Set[Attribute]) -> dict[Attribute, Any]:
    """Return what is equal as long as the attributes that ``forward`` assigns are the same."""
    return {(module, name): setting_key(vars(module).get(name)) for module, name in state}


def setting_key(value: Any) -> Any:
    """Return what is equal for settings with the same value."""
    if type(value) in PLAIN:
        return type(value), value
    inside: list[Any] | None = None
    if isinstance(value, list | tuple):
        inside = list(value)
    elif isinstance(value, dict):
        inside = [part for item in value.items() for part in item]
    elif isinstance(value, SimpleNamespace | argparse.Namespace) or (
        is_dataclass(value) and hasattr(value, "__dict__") and not isinstance(value, type)
    ):
        inside = [part for item in vars(value).items() for part in item]
    if inside is None or len(inside) > MAX_ELEMENTS:
        return SameObject(value)
    return type(value), tuple(map(setting_key, inside))
