"""Recurrent cells that the user's own loop steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxshap
from tests.helpers import assert_exact, explain

LAYERS = {
    "LSTM": (nn.LSTM, nn.LSTMCell, {}),
    "LSTM without biases": (nn.LSTM, nn.LSTMCell, {"bias": False}),
    "GRU": (nn.GRU, nn.GRUCell, {}),
    "RNN": (nn.RNN, nn.RNNCell, {}),
    "RNN with relu": (nn.RNN, nn.RNNCell, {"nonlinearity": "relu"}),
}


class Layer(nn.Module):
    """A recurrent layer, and a head for its last output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer, _, options = LAYERS[kind]
        self.layer = layer(3, 5, batch_first=True, **options)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Loop(Layer):
    """The same, step by step."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        _, cell, options = LAYERS[kind]
        self.cell = cell(3, 5, **options)
        for name, weight in self.layer.named_parameters():
            setattr(self.cell, name.removesuffix("_l0"), weight)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 5)
        memory = state
        for step in x.unbind(1):
            if isinstance(self.cell, nn.LSTMCell):
                state, memory = self.cell(step, (state, memory))
            else:
                state = self.cell(step, state)
        return self.head(state)


@pytest.mark.parametrize("kind", LAYERS)
def test_cells_have_the_values_of_their_layer(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    background, samples = (torch.randn(n, 6, 3, generator=generator).double() for n in (4, 2))
    layer, loop = Layer(kind).double(), Loop(kind).double()
    (expected,) = explain(fxshap.make_explainable(layer), [background], [samples])
    (found,) = assert_exact(loop, fxshap.make_explainable(loop), [background], [samples], 1e-12)
    assert abs(found - expected).max() <= 1e-14 * abs(expected).max() + 1e-16
