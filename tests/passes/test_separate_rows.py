"""What is computed from all rows, although rows do not influence each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from captum.attr import DeepLift
from torch import Tensor, nn

import fxshap
from fxshap.errors import BatchMixingError

Reduce = Callable[[Callable[..., Tensor], Tensor], Tensor]


class Head(nn.Module):
    """A hidden layer, and a function of its outputs."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.last, self.function = nn.Linear(6, 8), nn.Linear(8, 3), function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.last(self.hidden(x).relu()))


def softmax_by_hand(h: Tensor, reduced: Reduce) -> Tensor:
    largest = reduced(Tensor.amax, h)
    return (h - largest).exp() / (h - largest).exp().sum(-1, keepdim=True)


def without_gradient(h: Tensor, reduced: Reduce) -> Tensor:
    return (h - reduced(Tensor.amax, h).detach()).softmax(-1)


def of_another_shape(h: Tensor, reduced: Reduce) -> Tensor:
    smallest = reduced(Tensor.amin, h.exp().unflatten(1, (3, 1)))
    smallest = smallest.reshape(-1, 1) if smallest.dim() else smallest
    return (h - smallest).log_softmax(-1)


def centred(h: Tensor, reduced: Reduce) -> Tensor:
    return nn.functional.layer_norm(h - reduced(Tensor.mean, h), (3,))


def scaled(h: Tensor, reduced: Reduce) -> Tensor:
    return nn.functional.normalize(h / reduced(Tensor.amax, h.abs()))


def of_all(reduce: Callable[..., Tensor], h: Tensor) -> Tensor:
    return reduce(h)


def of_each(reduce: Callable[..., Tensor], h: Tensor) -> Tensor:
    return reduce(h, tuple(range(1, h.dim())), True)


FUNCTIONS = [softmax_by_hand, without_gradient, of_another_shape, centred, scaled]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_values_are_those_of_a_model_that_reduces_each_row(function):
    model, each = (Head(partial(function, reduced=reduced)) for reduced in (of_all, of_each))
    generator = torch.Generator().manual_seed(1)
    x, r = (torch.randn(5, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    values = DeepLift(fxshap.make_explainable(model)).attribute(x, r, target=0)
    change = (model(x) - model(r))[:, 0]
    torch.testing.assert_close(values.sum(1), change, rtol=0, atol=1e-12)
    expected = DeepLift(fxshap.make_explainable(each)).attribute(x, r, target=0)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    fxshap.testing.assert_explainable(fxshap.make_explainable(model), r[:3], x)


def test_elements_of_a_row_share_their_extreme():
    """As softmax over all tokens of a row, after rows and tokens were one dimension."""

    def over_tokens(h: Tensor) -> Tensor:
        tokens = torch.stack([h, 2 * h.sin()], 1).flatten(0, 1)
        return (tokens - tokens.max()).reshape(-1, 6).softmax(-1)

    model = Head(over_tokens)
    x = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    explainable = fxshap.make_explainable(model)
    fxshap.testing.assert_explainable(explainable, x[:3], x[3:])
    torch.testing.assert_close(explainable(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [lambda h: h / h.abs().max(), lambda h: h - h.mean(), lambda h: (h * h.max()).softmax(-1)],
    ids=["scaled", "centred", "sharpened"],
)
def test_rows_that_influence_each_other_are_refused_with_their_line(function):
    explainable = fxshap.make_explainable(Head(function))
    with pytest.raises(BatchMixingError, match=r"influence each other.*test_separate_rows\.py:"):
        fxshap.testing.assert_explainable(
            explainable, torch.randn(3, 6).double(), torch.randn(2, 6).double()
        )
