"""Recurrent layers, and their cells in a loop of the user's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxshap
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import TOLERANCE
from tests.helpers import assert_exact, explain
from tests.rules.helpers import FLOATS

aten = torch.ops.aten

LAYERS = {
    "LSTM": (nn.LSTM, nn.LSTMCell, {}),
    "LSTM without biases": (nn.LSTM, nn.LSTMCell, {"bias": False}),
    "GRU": (nn.GRU, nn.GRUCell, {}),
    "RNN": (nn.RNN, nn.RNNCell, {}),
    "RNN with relu": (nn.RNN, nn.RNNCell, {"nonlinearity": "relu"}),
}


class Layer(nn.Module):
    """A recurrent layer, and a linear layer for its last output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer, _, options = LAYERS[kind]
        self.layer = layer(3, 5, batch_first=True, **options)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Loop(Layer):
    """The same network, with its cell in a loop."""

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
def test_cells_in_a_loop_have_the_attributions_of_their_layer(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    background, samples = (torch.randn(n, 6, 3, generator=generator).double() for n in (4, 2))
    layer, loop = Layer(kind).double(), Loop(kind).double()
    (expected,) = explain(fxshap.make_explainable(layer), [background], [samples])
    (found,) = assert_exact(loop, fxshap.make_explainable(loop), [background], [samples], 1e-12)
    assert abs(found - expected).max() <= 1e-14 * abs(expected).max() + 1e-16


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_gates_of_huge_states_add_up(kind):
    """The parts of f c and of z (h - n) cancelled where a gate closes on a state of 1e30."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell = getattr(nn, kind.upper())(3, 4).double()
    generator = torch.Generator().manual_seed(1)

    def end(size: float) -> list[Tensor]:
        shapes = [(2, 5, 3), (1, 5, 4), (1, 5, 4)][: 3 if kind == "lstm" else 2]
        drawn = [torch.randn(shape, generator=generator).double() * size for shape in shapes]
        return [drawn[0] / size * 30, *drawn[1:]]

    r, x = end(1e30), end(1.0)
    weights, options = [w.detach() for w in cell.parameters()], (True, 1, 0.0, False, False, False)
    hidden = (r[1:],) if kind == "lstm" else (r[1],)
    arguments = (r[0], *hidden, weights, *options)
    operation, _ = Operation.bind(
        getattr(aten, kind).input, arguments, slots=tuple(range(len(r))), rows=(1,) * (len(r) + 1)
    )
    before, after = operation(*r), operation(*x)
    grad = tuple(torch.ones_like(y) if k < 1 else None for k, y in enumerate(before))
    found = apply_rule(operation, r, x, grad)
    attributed = sum((m * (b - a)).sum() for m, a, b in zip(found, r, x, strict=True))
    change = (after[0] - before[0]).sum()
    assert attributed.item() == pytest.approx(change.item(), rel=1e-9)


@FLOATS
def test_a_gate_that_closes_on_a_large_state_adds_up(dtype):
    """The halves of z (h - n), by z and by h, cancelled: an error of 1e-3 in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell = nn.GRU(3, 4)
    cell = cell.to(dtype)
    h_r = torch.tensor([[[0.0, 4.0, 9929.0, 0.0]]], dtype=dtype)
    h_x = torch.tensor([[[0.0, 4.0, 0.0, -1e-6]]], dtype=dtype)
    sequence = torch.zeros(2, 1, 3, dtype=dtype)
    weights, options = [w.detach() for w in cell.parameters()], (True, 1, 0.0, False, False, False)
    operation, _ = Operation.bind(
        aten.gru.input, (sequence, h_r, weights, *options), slots=(1,), rows=(1, 1, 1)
    )
    before, after = operation(h_r)[0], operation(h_x)[0]
    (m,) = apply_rule(operation, [h_r], [h_x], (torch.ones_like(before), None))
    attributed = (m.double() * (h_x.double() - h_r.double())).sum().item()
    change = (after.double() - before.double()).sum().item()
    assert attributed == pytest.approx(change, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
