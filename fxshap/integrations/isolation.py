"""A wrapper that shows attribution libraries a probe instead of the user's modules."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn
from typing_extensions import Self

from fxshap.integrations.hooks import hooking_libraries, live_hooks, remove_hooks
from fxshap.integrations.libraries import belongs_to_library


class IsolatedModel(nn.Module):
    """The user's model, out of reach of libraries that hook every leaf among the children.

    SHAP hooks leaves, and deletes attributes `x` and `y` of modules afterwards. It stops here,
    because this module shows no children. What PyTorch itself does to children is passed on.
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
        """Apply a function to the user's model too, unless an attribution library calls."""
        if not belongs_to_library(fn):
            self.model.apply(fn)
        return super().apply(fn)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.model._apply(fn, recurse)
        return self


class ProbedModule(nn.Module):
    """A wrapper of the user's model that libraries hook at a probe, which is never run.

    The submodules and attributes of the user's model are reachable under their own names.

    Parameters
    ----------
    model : nn.Module
        The user's model.

    Warns
    -----
    UserWarning
        If a public attribute of the wrapper hides a child of the user's model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._isolated = IsolatedModel(model)
        self._probes: dict[int, nn.Module] = {}
        self.training = model.training
        for name, _ in model.named_children():
            if not name.startswith("_") and hasattr(type(self), name):
                warnings.warn(
                    f"{type(self).__name__}.{name} hides the child {name!r} of "
                    f"{type(model).__name__}; reach the child with get_submodule({name!r})",
                    stacklevel=4,  # the call of make_explainable
                )

    @property
    def original_model(self) -> nn.Module:
        """The user's own model."""
        return self._isolated.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # As torch.compile's wrapper does it. Private names belong to their own class.
            if name.startswith("_") or "_isolated" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.original_model, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_probes": {}}  # no library hooks a copy

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state of the user's model, under its own names."""
        return self.original_model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state of the user's model."""
        return self.original_model.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load the state of a module that has this one as a child: PyTorch names what is inside."""
        inside = f"{prefix}_isolated.model."
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[inside + key.removeprefix(prefix)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_submodule(self, target: str) -> nn.Module:
        """Return a submodule of the user's model by its qualified name."""
        return self.original_model.get_submodule(target) if target else self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, but not for SHAP, which does not train."""
        if not hooking_libraries(self._probe):
            super().zero_grad(set_to_none)

    @property
    def _probe(self) -> nn.Module:
        """The module that libraries hook and that is never run: one for every thread."""
        thread = get_ident()
        if thread not in self._probes:
            self._probes[thread] = nn.ReLU()
        return self._probes[thread]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the children, among which SHAP and Captum find the probe."""
        yield from super().named_children()
        yield "probe", self._probe

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over all modules, among which tangermeme finds the probe."""
        yield from super().named_modules(memo, prefix, remove_duplicate)
        yield (f"{prefix}.probe" if prefix else "probe"), self._probe

    @contextmanager
    def _removing_hooks_on_error(self, probe: nn.Module) -> Iterator[None]:
        """Remove SHAP's hooks after an error; SHAP removes them only after a success."""
        try:
            yield
        except BaseException:
            self._remove_hooks(probe)
            raise

    def _remove_hooks(self, probe: nn.Module) -> None:
        """Remove hooks from the probe of this thread, and those elsewhere that are of no other."""
        me = get_ident()
        others = [frame for thread, frame in sys._current_frames().items() if thread != me]
        remove_hooks([probe])
        remove_hooks(
            [self._isolated, *self.original_model.modules()], keep=live_hooks(others, self)
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and back, without calling methods of the model."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
