"""Models whose capture could fail: each works, or raises an error that gives the reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fxshap


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()


class Around(nn.Module):
    """A function of a small network and the input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = network()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.net, x)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter that can be switched off."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.active = base, {"default": True}
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) if self.active["default"] else self.base(x)


class EightBits(nn.Module):
    """A linear layer that keeps its weights as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 128, (2, 4), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(nn.functional.linear(x, self.weight.to(x.dtype) / 127))


@torch.library.custom_op("tests::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def halved_shape(x: Tensor) -> Tensor:
    if not isinstance(x.shape[0], int):
        raise TypeError("a number of rows is a number")
    return torch.empty_like(x)


def halved_backward(ctx: object, grad: Tensor) -> Tensor:
    return grad / 2


halved.register_autograd(halved_backward)


def branch(net: nn.Module, x: Tensor) -> Tensor:
    return net(x) if x.sum() > 0 else -net(x)


def loop(net: nn.Module, x: Tensor) -> Tensor:
    while x.norm() > 1:
        x = x / 2
    return net(x)


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.GELU(), second)


def compiled_in_place() -> nn.Module:
    inner = network()
    inner.compile()
    return nn.Sequential(nn.Linear(4, 4), inner)


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(4, 8)), nn.GELU(), nn.Linear(8, 2))


WORKS: dict[str, Callable[[], nn.Module]] = {
    "a number taken from a weight": lambda: Around(
        lambda net, x: net(x) * net[0].weight.abs().max().item()
    ),
    "checkpoint": lambda: Around(lambda net, x: checkpoint(net, x, use_reentrant=False)),
    "reentrant checkpoint": lambda: Around(lambda net, x: checkpoint(net, x, use_reentrant=True)),
    "compiled submodule": lambda: nn.Sequential(nn.Linear(4, 4), torch.compile(network())),
    "submodule compiled in place": compiled_in_place,
    "traced submodule": lambda: nn.Sequential(
        nn.Linear(4, 4), torch.jit.trace(network(), torch.randn(3, 4))
    ),
    "scripted submodule": lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.script(network())),
    "frozen submodule": lambda: nn.Sequential(
        nn.Linear(4, 4), torch.jit.freeze(torch.jit.script(network()))
    ),
    "scripted": lambda: torch.jit.script(network()),
    "traced": lambda: torch.jit.trace(network(), torch.randn(3, 4)),
    "weights in 8 bits": EightBits,
    "computed by NumPy": lambda: Around(lambda net, x: net(torch.from_numpy(np.exp(x.numpy())))),
    "only for numbers of rows that are known": lambda: Around(lambda net, x: halved(net(x))),
    "weight norm": lambda: normed(parametrizations.weight_norm),
    "spectral norm": lambda: normed(parametrizations.spectral_norm),
    "adapters": lambda: nn.Sequential(
        Adapted(nn.Linear(4, 8)), nn.GELU(), Adapted(nn.Linear(8, 2))
    ),
    "tied weights": tied,
    "data parallel": lambda: nn.DataParallel(network()),
    "rows taken one by one": lambda: Around(lambda net, x: torch.stack([net(row) for row in x])),
    "rows counted by NumPy": lambda: Around(
        lambda net, x: net(x) + torch.from_numpy(np.zeros((len(x), 2), dtype="float32"))
    ),
}

FAILS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a number taken from the input": (
        lambda: Around(lambda net, x: net(x) * x.abs().max().item()),
        r"takes a number out of a tensor",
    ),
    "a branch on values": (lambda: Around(branch), r"x\.sum\(\) > 0.*torch\.where"),
    "a loop on values": (lambda: Around(loop), r"while x\.norm\(\) > 1.*by the value of a tensor"),
    "a size that depends on values": (
        lambda: Around(lambda net, x: net(x) + x[x > 0].sum()),
        r"the size of a tensor depends on values",
    ),
    "functions given to an operator": (
        lambda: Around(lambda net, x: torch.cond(x.sum() > 0, net, lambda h: net(h).cos(), (x,))),
        r"functions to cond; compute all branches.*torch\.where",
    ),
    "attention with functions": (
        lambda: Around(lambda net, x: net(flex_attention(*[x.view(-1, 1, 2, 2)] * 3).flatten(1))),
        r"functions to flex_attention.*scaled_dot_product_attention",
    ),
    "a number taken by NumPy": (
        lambda: Around(lambda net, x: net(x) * float(x.numpy().max())),
        r"x\.numpy\(\).*takes a number out of a tensor",
    ),
    "what only NumPy has": (
        lambda: Around(lambda net, x: net(x) + float(np.polyfit([0, 1], x.numpy()[0, :2], 1)[0])),
        r"np\.polyfit.*takes a number out of a tensor",
    ),
    "quantized weights": (
        lambda: torch.ao.quantization.quantize_dynamic(network(), {nn.Linear}, torch.qint8),
        r"0 is a torch\.ao\.nn\.quantized\.dynamic.*Linear.*before quantize_dynamic",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("make", WORKS.values(), ids=WORKS)
def test_it_is_captured_and_adds_up(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, background, samples = make().eval(), torch.randn(5, 4), torch.randn(2, 4)
    values = shap.DeepExplainer(fxshap.make_explainable(model), background).shap_values(samples)
    with torch.no_grad():
        change = (model(samples) - model(background).mean(0)).numpy()
    assert np.abs(values.sum(1) - change).max() <= 1e-6


@pytest.mark.parametrize(("make", "message"), FAILS.values(), ids=FAILS)
def test_it_is_refused_with_the_line_and_a_remedy(
    make: Callable[[], nn.Module], message: str
) -> None:
    torch.manual_seed(0)
    explainable = fxshap.make_explainable(make().eval())
    with pytest.raises(fxshap.FxshapError, match=message):
        shap.DeepExplainer(explainable, torch.randn(5, 4)).shap_values(torch.randn(2, 4))
