"""Bound tensors with rows, with one row, and without rows."""

import captum.attr as ca
import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from fxshap.errors import InputError, OutputError
from fxshap.frontend.bound import find_shared
from tests.networks.reports import REPORTS
from tests.networks.reports.graphs import RING


class Scaled(nn.Module):
    """Every row has its unit."""

    def forward(self, x: Tensor, unit: Tensor) -> Tensor:
        return torch.tanh(x * unit[:, None])


class Standardized(nn.Module):
    """All rows have the same statistics."""

    def forward(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return torch.tanh((x - mean) / std)


class Tempered(nn.Module):
    """A temperature of shape (1,), which broadcasts over features."""

    def forward(self, x: Tensor, temperature: Tensor) -> Tensor:
        return torch.tanh(x) / temperature


def shap_values(model, background, samples):
    return shap.DeepExplainer(model, background).shap_values(samples)


STATISTICS = {"mean": torch.tensor([1.0, 2.0, 3.0]), "std": torch.tensor([1.0, 0.5, 2.0])}


@pytest.mark.parametrize("rows, samples", [(5, 2), (3, 3), (3, 1), (1, 3), (6, 6)])
def test_statistics_are_shared_whatever_the_rows(rows, samples):
    """Three features and three rows are no coincidence that misleads."""
    background, x = torch.randn(rows, 3), torch.randn(samples, 3)
    model = fxshap.make_explainable(Standardized()).bind(**STATISTICS)
    values = shap_values(model, background, x)
    held = fxshap.make_explainable(Held(Standardized(), STATISTICS))
    np.testing.assert_allclose(values, shap_values(held, background, x), atol=1e-6)
    assert torch.equal(model(x), Standardized()(x, **STATISTICS))
    if samples == rows:
        found = ca.DeepLift(model).attribute(x, background, target=1)
        expected = ca.DeepLift(held).attribute(x, background, target=1)
        torch.testing.assert_close(found, expected)


class Held(nn.Module):
    """A model that holds its arguments, as the advice was before."""

    def __init__(self, model: nn.Module, arguments: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, **self.arguments)


@pytest.mark.parametrize("features", [1, 2, 3])
def test_a_temperature_is_no_row(features):
    background, x = torch.randn(4, features), torch.randn(3, features)
    temperature = torch.tensor([0.5])
    model = fxshap.make_explainable(Tempered()).bind(temperature=temperature)
    values = shap_values(model, background, x)
    expected = shap_values(
        fxshap.make_explainable(Held(Tempered(), {"temperature": temperature})), background, x
    )
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_edges_of_two_rows_are_no_two_samples():
    report = REPORTS["rows_of_graphs"]
    model = fxshap.make_explainable(report.build()).bind(edge_index=RING)
    (x,), (r,) = report.inputs(2, seed=2), report.inputs(2, seed=1)
    values = ca.DeepLift(model).attribute(x, r, target=0)
    change = (model(x) - model(r))[:, 0]
    assert (values.sum((1, 2)) - change).abs().max() < 1e-5


def test_captum_names_arguments_that_it_repeats():
    report = REPORTS["rows_of_graphs"]
    model = fxshap.make_explainable(report.build())
    (x,), (r,) = report.inputs(3, seed=2), report.inputs(3, seed=1)
    with pytest.raises(InputError, match=r"shape \(2, 10\) has not the rows.*explainable.bind"):
        ca.DeepLift(model).attribute(x, r, target=0, additional_forward_args=RING)


def test_a_graph_whose_nodes_are_rows_is_told_from_rows():
    report = REPORTS["one_graph"]
    nodes = torch.randn(5, 2)
    with pytest.raises(OutputError, match=r"returns 1 rows for inputs of 5.*unbatched=True"):
        shap.DeepExplainer(fxshap.make_explainable(report.build()).bind(**report.bound), nodes)


def test_units_of_every_row_stay_with_their_rows():
    units, x, r = torch.tensor([1.0, 3.0, 9.0]), torch.randn(3, 3), torch.randn(3, 3)
    model = fxshap.make_explainable(Scaled()).bind(unit=units)
    found = ca.DeepLift(model).attribute(x, r, target=1)
    assert (found.sum(1) - (model(x) - model(r))[:, 1]).abs().max() < 1e-5
    with pytest.raises(InputError, match=r"bind\(unit=unit\[i:i\+1\]\).*fxshap.Shared"):
        shap.DeepExplainer(model, r)
    explainer = fxshap.DeepExplainer(fxshap.make_explainable(Scaled()).bind(unit=units[:1]), r)
    values = explainer.shap_values(x, unit=units)
    for i in range(3):
        one = slice(i, i + 1)
        bound = fxshap.make_explainable(Scaled()).bind(unit=units[one])
        np.testing.assert_allclose(values[one], shap_values(bound, r, x[one]), atol=1e-6)


def test_shared_says_it_where_the_model_accepts_both():
    """The mean of the units is the same for all rows, and units of three rows would fit too."""

    class Both(nn.Module):
        def forward(self, x: Tensor, unit: Tensor) -> Tensor:
            return torch.tanh(x * unit.mean())

    units, x, r = torch.tensor([1.0, 3.0, 9.0]), torch.randn(2, 3), torch.randn(4, 3)
    for bound in (units, fxshap.Shared(units)):
        model = fxshap.make_explainable(Both()).bind(unit=bound)
        assert shap_values(model, r, x).shape == (2, 3, 3)
        assert torch.equal(model(x), Both()(x, units))


def test_arguments_of_the_explainer_are_shared_too():
    model, x, r = fxshap.make_explainable(Standardized()), torch.randn(2, 3), torch.randn(4, 3)
    explainer = fxshap.DeepExplainer(model.bind(**STATISTICS), r)
    other = {"mean": torch.zeros(3), "std": np.ones(3)}
    expected = shap_values(model.bind(mean=torch.zeros(3), std=torch.ones(3)), r, x)
    np.testing.assert_allclose(explainer.shap_values(x, **other), expected, atol=1e-6)


def test_the_model_is_asked_once_for_a_kind_of_call():
    calls = []

    class Counted(Standardized):
        def forward(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x, mean, std)

    model = fxshap.make_explainable(Counted()).bind(**STATISTICS)
    model(torch.randn(7, 3))
    assert calls == [2, 4, 7]
    model(torch.randn(9, 3))
    assert calls == [2, 4, 7, 9]


def test_tensors_of_one_row_are_repeated_first():
    seen = []

    def run(arguments, rows):
        seen.append((rows, arguments["mask"].shape, arguments["edges"].shape))
        return torch.ones(rows, 2)

    bound = {"mask": torch.ones(1, 4), "edges": torch.ones(2, 6), "k": 3}
    assert find_shared(bound, run) == {1}
    assert seen == [(3, (3, 4), (2, 6)), (4, (4, 4), (2, 6)), (3, (1, 4), (2, 6))]


def test_what_the_model_computes_with_the_tensor_as_it_is_decides():
    def run(arguments, rows):
        return torch.ones(rows, 1) / arguments["temperature"]  # repeated, it would be (rows, rows)

    assert find_shared({"temperature": torch.tensor([2.0])}, run) == {0}
