"""A model that was reported, or that many people write: a network and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.networks.network import Network


@dataclass(frozen=True)
class Report(Network):
    """A network that was reported, with the way its users explain it.

    Parameters
    ----------
    source : str
        Where it was reported, or the habit that it stands for.
    draw : callable, optional
        Draws the inputs from a number of rows and a seed, in place of standard normal ones.
    options : dict
        The options of ``make_explainable``.
    bound : dict
        The arguments that ``bind`` gives before the call.
    tools : tuple of str
        The tools that can explain it: ``"shap"``, ``"captum"``, ``"tangermeme"``.
    """

    source: str = ""
    draw: Callable[[int, int], tuple[Tensor, ...]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    bound: dict[str, Any] = field(default_factory=dict)
    tools: tuple[str, ...] = ("shap", "captum")

    def inputs(
        self, count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, ...]:
        """Draw samples: those of ``draw``, or standard normal ones."""
        if self.draw is not None:
            return tuple(x.to(dtype) for x in self.draw(count, seed))
        return super().inputs(count, seed=seed, dtype=dtype)
