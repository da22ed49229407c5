"""Recurrent layers are captured as one operation, whatever the number of steps."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxshap
from fxshap.ops.recurrent import OPERATORS

LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": partial(nn.RNN, nonlinearity="relu"),
}


class LastStep(nn.Module):
    """A stack of two bidirectional layers; its last output is read out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = LAYERS[kind](2, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0][:, -1])


class WrittenInPlace(LastStep):
    """The same after a write into a view, which torch has to make functional."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        first = y[:, 0]
        y[:, 0] = 2 * first
        y.add_(first.unsqueeze(1))
        return super().forward(y)


def operations_on_fake_tensors(model: nn.Module, steps: int) -> int:
    """Return how many operations a capture runs on fake tensors."""
    explainable = fxshap.make_explainable(model.eval())
    dispatch = FakeTensorMode.dispatch
    with mock.patch.object(
        FakeTensorMode, "dispatch", autospec=True, side_effect=dispatch
    ) as counted:
        explainable.capture(torch.randn(2, steps, 2))
    return counted.call_count


@pytest.mark.parametrize("architecture", [LastStep, WrittenInPlace])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_capture_runs_as_many_operations_for_any_number_of_steps(kind, architecture):
    few = operations_on_fake_tensors(architecture(kind), 3)
    assert few > 0
    assert operations_on_fake_tensors(architecture(kind), 1000) == few


@pytest.mark.parametrize("architecture", [LastStep, WrittenInPlace])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_recurrent_layer_is_one_operation(kind, architecture):
    explainable = fxshap.make_explainable(architecture(kind).eval(), torch.randn(2, 4, 2))
    nodes = explainable.tapped_graph.graph.nodes
    assert sum(node.target is OPERATORS[kind] for node in nodes) == 1
    assert len(nodes) < 100
