"""Which attribution library is asking, told by the marks it leaves on a module that is never run.

SHAP's ``DeepExplainer`` puts a hook on every leaf module before it asks for attributions and
removes it afterwards. The explainable model owns one leaf for this purpose, the probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxshap.errors import InputError


def is_shap_hook(hook: Callable[..., Any]) -> bool:
    """Say whether a hook is SHAP's own."""
    return getattr(hook, "__module__", "").startswith("shap.explainers._deep")


def is_hooked(probe: nn.Module) -> bool:
    """Say whether SHAP has hooked the probe."""
    return any(map(is_shap_hook, probe._backward_hooks.values()))


def is_asking(probe: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Say whether SHAP has hooked the probe and is recording a gradient of these inputs."""
    return is_hooked(probe) and torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def refuse_layers(model: nn.Module) -> None:
    """Raise if SHAP asks about the input of one of the model's own layers."""
    asked = [
        (name, module)
        for name, module in model.named_modules()
        if any(map(is_shap_hook, module._forward_hooks.values()))
    ]
    if asked:
        remove_hooks([module for _, module in asked])
        raise InputError(
            f"shap.DeepExplainer((model, layer), ...) asks about the input of '{asked[0][0]}', "
            "which fxshap does not explain yet; put what follows that layer into a module of its "
            "own, and explain that from the layer's inputs"
        )


def remove_hooks(modules: Sequence[nn.Module]) -> None:
    """Remove SHAP's hooks, which it leaves behind when a call of its own fails."""
    for module in modules:
        for hooks in (module._forward_hooks, module._backward_hooks):
            for key in [key for key, hook in hooks.items() if is_shap_hook(hook)]:
                del hooks[key]
