"""The user's model, out of reach of libraries that hook every leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import nn

from fxshap.integrations.libraries import belongs_to_library


class IsolatedModel(nn.Module):
    """The user's model, out of reach of those who hook every leaf they find among the children.

    SHAP hooks leaves, and deletes attributes `x` and `y` of modules afterwards. It stops here,
    since this module shows no children; what PyTorch itself does to children is passed on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Return no children."""
        return iter(())

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the user's model too."""
        self.model.train(mode)
        return super().train(mode)

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Apply a function to the user's model too, unless an attribution library asks."""
        if not belongs_to_library(fn):
            self.model.apply(fn)
        return super().apply(fn)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.model._apply(fn, recurse)
        return self


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back; no method of the model is called."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
