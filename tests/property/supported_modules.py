"""Random networks of the modules that stock SHAP supports, written as tutorials write them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Activations, and functions that compute the same.
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "ReLU": (nn.ReLU, torch.relu),
    "ELU": (nn.ELU, F.elu),
    "Sigmoid": (nn.Sigmoid, torch.sigmoid),
    "Tanh": (nn.Tanh, torch.tanh),
    "Softplus": (nn.Softplus, F.softplus),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.2), lambda x: F.leaky_relu(x, 0.2)),
    "SELU": (nn.SELU, F.selu),
    "GELU": (nn.GELU, F.gelu),
}

#: Modules that change nothing in evaluation mode.
PASSING = {
    "Identity": nn.Identity,
    "Dropout": lambda: nn.Dropout(0.3),
    "AlphaDropout": lambda: nn.AlphaDropout(0.3),
}

#: The shape of one input for every number of spatial dimensions.
SHAPES = {0: (6,), 1: (2, 6), 2: (1, 6, 6), 3: (1, 4, 4, 4)}

#: How activations are written.
WRITTEN = ("modules", "modules", "modules", "in place", "one for all", "functions")

#: How the last feature map becomes a vector.
FLATTENED: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda h: torch.flatten(h, 1),
    "view": lambda h: h.view(h.size(0), -1),
    "reshape": lambda h: h.reshape(len(h), -1),
    "squeeze": lambda h: h.squeeze() if h.numel() == h.shape[0] * h.shape[1] else h.flatten(1),
    "mean": lambda h: h.flatten(2).mean(-1) if h.dim() > 2 else h,
}


class Drawn(nn.Module):
    """A network that is drawn from a seed.

    Attributes
    ----------
    names : set of str
        The modules it is made of, and how they are used.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.names: set[str] = set()
        self.dims = self.draw.choice((0, 1, 1, 2, 2, 3))
        self.written = self.pick(WRITTEN)
        self.shared = nn.ReLU()
        layers = list(self.body())
        chained = self.draw.random() < 0.5
        self.body_layers = nn.Sequential(*layers) if chained else nn.ModuleList(layers)
        self.flat = self.pick(list(FLATTENED))
        with torch.no_grad():
            width = self.features(torch.zeros(2, *SHAPES[self.dims])).shape[1]
        self.hidden, self.act = nn.Linear(width, 5), self.activation()
        self.head = nn.Linear(5, self.draw.choice((1, 2, 3)))
        self.last = self.draw.choice((nn.Identity, nn.Identity, lambda: nn.Softmax(dim=1)))()
        self.names.add(type(self.last).__name__)
        self.eval()

    def pick(self, names: Any) -> Any:
        """Draw a name, and remember it."""
        name = self.draw.choice(names)
        self.names.add(name)
        return name

    def of_dims(self, name: str) -> Callable[..., nn.Module]:
        """Return a module class by its name without the number of dimensions."""
        self.names.add(f"{name}{self.dims}d")
        made: Callable[..., nn.Module] = getattr(nn, f"{name}{self.dims}d")
        return made

    def body(self) -> Iterator[nn.Module]:
        """Draw the layers before the head."""
        channels = SHAPES[self.dims][0]
        for _ in range(self.draw.randint(1, 2)):
            wider = self.draw.choice((2, 3))
            if self.dims:
                convolution = self.draw.choice(("Conv", "Conv", "ConvTranspose"))
                yield self.of_dims(convolution)(channels, wider, 3, padding=1)
                if self.draw.random() < 0.4:
                    yield self.of_dims("BatchNorm")(wider)
            else:
                yield nn.Linear(channels, wider)
            yield self.activation()
            if self.draw.random() < 0.4:
                yield PASSING[self.pick(list(PASSING))]()
            channels = wider
        if self.dims:
            pool = self.draw.choice(("MaxPool", "AvgPool", "AdaptiveAvgPool", "none"))
            if pool == "AdaptiveAvgPool":
                yield self.of_dims(pool)(1)
            elif pool != "none":
                yield self.of_dims(pool)(2)

    def activation(self) -> nn.Module:
        """Draw an activation, written in the way of this network."""
        if self.written == "one for all":
            return self.shared
        name = self.draw.choice(("ReLU", "LeakyReLU", "ELU", "SELU"))
        if self.written == "in place":
            self.names.add(name)
            module: nn.Module = getattr(nn, name)(inplace=True)
            return module
        module_type, function = ACTIVATIONS[self.pick(list(ACTIVATIONS))]
        return module_type() if self.written == "modules" else Function(function)

    def features(self, x: Tensor) -> Tensor:
        """Return the input of the head."""
        if isinstance(self.body_layers, nn.Sequential):
            x = self.body_layers(x)
        else:
            for layer in self.body_layers:
                x = layer(x)
        return FLATTENED[self.flat](x)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, *SHAPES[dims])."""
        return self.last(self.head(self.act(self.hidden(self.features(x)))))


class Function(nn.Module):
    """A function as a module that has leaves, so that libraries do not hook it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function."""
        return self.function(x)
