"""Random networks of the modules that stock SHAP supports, written as tutorials write them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

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


#: What people do with the input before the first layer.
BEFORE = (
    "nothing", "standardized", "asserted", "recorded", "sliced", "noise in training",
    "cloned in place",
)  # fmt: skip

#: What they do with the hidden layer, of 5 features.
HIDDEN = (
    "nothing", "residual", "added in place", "functional dropout", "weight norm", "old weight norm",
    "spectral norm", "own parametrization", "observed by a hook", "changed by a hook",
)  # fmt: skip

#: How the outputs are put together.
OUTPUTS = ("head", "head", "heads", "dict of heads", "flattened", "squeezed")


class Doubled(nn.Module):
    """A parametrization of a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer uses."""
        return 2 * weight


#: How the weight of a layer is parametrized.
PARAMETRIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "old weight norm": nn.utils.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "own parametrization": lambda layer: parametrize.register_parametrization(
        layer, "weight", Doubled()
    ),
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
        self.before, self.between = self.pick(BEFORE), self.pick(HIDDEN)
        self.shared = nn.ReLU()
        layers = list(self.body())
        chained = self.draw.random() < 0.5
        self.body_layers = nn.Sequential(*layers) if chained else nn.ModuleList(layers)
        self.flat = self.pick(list(FLATTENED))
        self.register_buffer("mean", torch.tensor(0.1))
        self.register_buffer("deviation", torch.tensor(1.5))
        self.largest, self.seen = 0.0, torch.empty(0)
        with torch.no_grad():
            width = self.features(torch.zeros(2, *SHAPES[self.dims])).shape[1]
        self.hidden, self.act = nn.Linear(width, 5), self.activation()
        if self.between in PARAMETRIZED:
            self.hidden = PARAMETRIZED[self.between](self.hidden)
        elif self.between == "observed by a hook":
            self.hidden.register_forward_hook(self.observe)
        elif self.between == "changed by a hook":
            self.hidden.register_forward_hook(lambda module, args, output: output * 0.5)
        self.outputs, sizes = self.pick(OUTPUTS), self.draw.choice(((1,), (2,), (1, 2)))
        self.heads = nn.ModuleList(nn.Linear(5, size) for size in sizes)
        self.named_heads = nn.ModuleDict({f"task_{k}": head for k, head in enumerate(self.heads)})
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
        if self.before == "sliced" and not self.dims:
            channels //= 2
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

    def observe(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Store what a layer returns, as hooks of users do."""
        self.seen = output.detach()

    def prepared(self, x: Tensor) -> Tensor:
        """Return the input of the first layer."""
        match self.before:
            case "standardized":
                return (x - self.mean) / self.deviation
            case "asserted":
                assert x.shape[1:] == SHAPES[self.dims], x.shape
                assert not torch.isnan(x).any()
            case "recorded":
                self.largest = x.abs().max().item()
            case "sliced":
                return x[..., : x.shape[-1] // 2]
            case "noise in training" if self.training:
                return x + torch.randn_like(x)
            case "cloned in place":
                out = x.clone()
                out *= 2
                return out
        return x

    def activated(self, h: Tensor) -> Tensor:
        """Return the input of the heads."""
        out: Tensor = self.act(h)
        match self.between:
            case "residual":
                return out + h
            case "added in place":
                out += h
            case "functional dropout":
                return F.dropout(out, 0.5, self.training)
        return out

    def joined(self, h: Tensor) -> Tensor:
        """Return the outputs of all heads."""
        if self.outputs == "dict of heads":
            return torch.cat([head(h) for head in self.named_heads.values()], -1)
        y = torch.cat([head(h) for head in self.heads], 1)
        if self.outputs == "flattened":
            return y.flatten(0).view(-1, y.shape[1])
        return y.squeeze().view(len(h), -1) if self.outputs == "squeezed" else y

    def features(self, x: Tensor) -> Tensor:
        """Return the input of the hidden layer."""
        x = self.prepared(x)
        if isinstance(self.body_layers, nn.Sequential):
            x = self.body_layers(x)
        else:
            for layer in self.body_layers:
                x = layer(x)
        return FLATTENED[self.flat](x)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, *SHAPES[dims])."""
        return self.last(self.joined(self.activated(self.hidden(self.features(x)))))


class Function(nn.Module):
    """A function as a module that has leaves, so that libraries do not hook it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function."""
        return self.function(x)
