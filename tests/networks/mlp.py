"""The multilayer perceptron that most networks of one operation are made of."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with a callable, module or plain function, between each two.

    Parameters
    ----------
    *functions : callable
        What is applied after each linear layer but the last. The same module may be given
        more than once.
    width : int
        The size of the hidden layers.
    shrink : int
        How many times smaller a function makes its last dimension.
    outputs : int
        The number of output columns.
    """

    def __init__(
        self,
        *functions: Callable[[Tensor], Tensor],
        width: int = 12,
        shrink: int = 1,
        outputs: int = 3,
    ) -> None:
        super().__init__()
        sizes = [10] + [width // shrink] * (len(functions) - 1)
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.activations = nn.ModuleList(f for f in functions if isinstance(f, nn.Module))
        self.functions = functions
        self.head = nn.Linear(width // shrink, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        for layer, function in zip(self.layers, self.functions, strict=True):
            x = function(layer(x))
        return self.head(x)


class Between(nn.Module):
    """A function of any output size between two linear layers.

    Parameters
    ----------
    function : callable
        Maps a (batch, `width`) tensor to any shape with the batch first.
    width : int
        The size of the hidden layer.
    outputs : int
        The number of output columns.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], *, width: int = 12, outputs: int = 3
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(10, width)
        self.function = function
        with torch.no_grad():
            size = function(torch.ones(2, width)).flatten(1).shape[1]
        self.head = nn.Linear(size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the two layers with the function between them."""
        return self.head(self.function(self.layer(x)).flatten(1))
