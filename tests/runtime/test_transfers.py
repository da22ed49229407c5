"""What is read at once: rows, cotangents, and the conditions of rules."""

import numpy as np
import pytest
import shap
import torch
from torch import nn

import fxshap
from fxshap.errors import OutputError
from fxshap.rules.core import tracing
from fxshap.rules.core.secants import indices_of_few
from fxshap.rules.core.tracing import any_unless_tracing, deferring_conditions
from fxshap.runtime.transfers import Deferral, read_cotangent, read_rows

X = torch.arange(6.0).reshape(2, 3)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tracing, "reading_waits", lambda value: True)


def test_rows_are_read_together():
    same, other = [X[:1].expand(2, 3)], [X]
    reading = read_rows(same, 1, other, [X.clone()])
    assert (reading.repeated, reading.finite, reading.same_references) == (True, True, True)
    assert reading.first_row == X[0].numpy().tobytes()
    assert not read_rows(other, 1, other, None).repeated
    assert not read_rows(same, 1, other, None).same_references
    assert not read_rows(same, 1, other, [X[:1]]).same_references
    assert not read_rows(same, 1, other, [X + 1]).same_references
    assert not read_rows([X[:1] * torch.inf], 1, other, None).finite


def test_rows_of_several_types_are_read_together():
    samples = [X.double(), torch.tensor([[1], [2]]), torch.tensor([[True], [False]]), X.bfloat16()]
    reading = read_rows([x[:1] for x in samples], 1, samples, samples)
    assert reading.repeated and reading.finite and reading.same_references
    assert len(reading.first_row) == 3 * 8 + 8 + 1 + 3 * 2


def test_a_cotangent_is_read_together_with_the_output():
    grad = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    reading = read_cotangent(grad, torch.zeros(2, 2))
    assert (reading.same, reading.finite, reading.column) == (True, True, 1)
    reading = read_cotangent(torch.eye(2), torch.full((2, 2), torch.nan))
    assert (reading.same, reading.finite, reading.column) == (False, False, 0)
    assert read_cotangent(torch.ones(2, 2, 2), torch.zeros(2, 2, 2)).column is None


def test_what_assumed_too_much_runs_again_and_is_not_trusted():
    calls = []

    def run(holds):
        calls.append(tracing.is_deferring())
        return "slow" if any_unless_tracing(torch.tensor(holds)) else "fast"

    deferral = Deferral()
    assert deferral(lambda: run(False)) == "fast" and calls == [True]
    assert deferral(lambda: run(True)) == "slow" and calls == [True, True, False]
    assert deferral(lambda: run(False)) == "fast" and calls[3:] == [False]


def test_an_error_counts_if_no_condition_holds():
    def run(holds):
        any_unless_tracing(torch.tensor(holds))
        if tracing.is_deferring():
            raise ValueError("too early")
        return "slow"

    with pytest.raises(ValueError, match="too early"):
        Deferral()(lambda: run(False))
    assert Deferral()(lambda: run(True)) == "slow"


@pytest.mark.parametrize("condition", ["", "0", "1", "0000", "0100", "1001", "0110", "1111"])
def test_indices_of_few_are_those_of_nonzero(condition):
    flags = torch.tensor([c == "1" for c in condition], dtype=torch.bool)
    most = min(2, len(flags))
    with deferring_conditions() as conditions:
        index = indices_of_few(flags, most)
    expected = flags.nonzero().squeeze(1)
    assert any(map(bool, conditions)) == (len(expected) > most)
    assert len(index) == most
    if 0 < len(expected) <= most:
        assert set(index.tolist()) == set(expected.tolist())
    if not len(expected):
        assert set(index.tolist()) <= {0}


class Extreme(nn.Module):
    """Logits that change much, a logarithm at 0, and products that cancel."""

    def forward(self, x):
        y = (x * 200).softmax(-1) * (x * 1e5)
        gate = torch.sigmoid(x * 100) * torch.exp(x * 20)
        return torch.cat([y, gate, nn.functional.gelu(x / 100)], -1)[:, :8]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("close", [False, True])
def test_conditions_that_hold_give_the_same_values(close):
    generator = torch.Generator().manual_seed(0)
    background, x = torch.randn(4, 3, generator=generator), torch.randn(3, 3, generator=generator)
    x = background[:3] + 1e-3 if close else x
    values = fxshap.DeepExplainer(Extreme(), background).shap_values(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "reading_waits", lambda value: False)
        patch.setattr(Deferral, "__call__", lambda self, run: run())
        expected = fxshap.DeepExplainer(Extreme(), background).shap_values(x)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_outputs_that_are_not_finite_are_named():
    class Logarithm(nn.Module):
        def forward(self, x):
            return torch.cat([x, x.log()], 1)

    background, x = torch.rand(4, 2) + 1, -torch.rand(2, 2) - 1
    with pytest.raises(OutputError, match="output 2 of the sample"):
        fxshap.DeepExplainer(Logarithm(), background).shap_values(x)
    explainer = shap.DeepExplainer(fxshap.make_explainable(Logarithm()), background)
    with pytest.raises(OutputError, match="output 2 of the sample"):
        explainer.shap_values(x)
