"""Guards: what the Python code of a model has read that no explained input changes.

A capture holds only as long as these values do. They are computed again, from the present weights
and bound arguments, before a capture is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from fxshap.graph.nodes import tensor_at


@dataclass(frozen=True, eq=False)
class Guards:
    """The values that the decisions of a model have read from weights and bound arguments.

    Attributes
    ----------
    module : fx.GraphModule
        ``module(*inputs) -> values``.
    weights : dict of str to str
        As in :class:`~fxshap.capture.captured.Captured`.
    expected : tuple of Tensor
        The values during the capture.
    """

    module: fx.GraphModule
    weights: dict[str, str]
    expected: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def read(self, model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the present values."""
        for name, path in self.weights.items():
            if hasattr(self.module, name):
                setattr(self.module, name, tensor_at(model, path).detach())
        with torch.random.fork_rng(devices=[]):
            # A call of the module would print the line of the graph that fails.
            values: tuple[Tensor, ...] = self.module.forward(*inputs)
        return values

    def hold(self, model: nn.Module, inputs: Sequence[Tensor]) -> bool:
        """Return True if all values are as during the capture.

        Parameters
        ----------
        model : nn.Module
        inputs : sequence of Tensor
            The inputs of the graph, the explained ones included, which have no influence.
        """
        if not self.expected:
            return True
        try:
            values = self.read(model, inputs)
        except Exception:  # a later value is read at a size or index that an earlier one gave
            return False
        return all(map(unchanged, values, self.expected))


def unchanged(value: Tensor, expected: Tensor) -> bool:
    """Return True if two values are equal up to rounding."""
    if value.shape != expected.shape:
        return False
    if not (value.is_floating_point() or value.is_complex()):
        return torch.equal(value, expected)
    tolerance = 8 * torch.finfo(value.dtype).eps  # a sum over another number of rows
    return torch.allclose(value, expected, rtol=tolerance, atol=0.0, equal_nan=True)
