"""Samples and references take the decisions of the capture, or an error names the line."""

from __future__ import annotations

import numpy as np
import pytest
import shap
import torch
from torch import Tensor, distributions

import fxshap
from fxshap.errors import InputError
from tests.error_cases import Model

REFERENCES, SAMPLES = torch.rand(5, 4), torch.rand(2, 4)


class Asserts(Model):
    def forward(self, x: Tensor) -> Tensor:
        assert (x.abs() < 100).all(), "too large"  # the assertion
        return super().forward(x)


class AssertsAndSqueezes(Asserts):
    """Takes no single row, as ``squeeze`` removes the dimension of the rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, None].squeeze()[:, :2]


class Validates(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return distributions.Normal(y, 10 - x[:, :1]).mean


class Narrow(Model):
    """Another branch for numbers that no other answer hits."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if 7.0 < float(x.max()) < 7.5:  # the number
            return -y
        return y


@pytest.fixture
def validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distributions check their arguments, as in a process where ``torch.compile`` has not run."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)


@pytest.mark.usefixtures("validation")
@pytest.mark.parametrize("model", [Asserts(), Validates()])
def test_a_sample_for_which_the_model_raises_is_refused(model: Model) -> None:
    explainer = shap.DeepExplainer(fxshap.make_explainable(model), REFERENCES)
    values = explainer.shap_values(SAMPLES)
    change = model(SAMPLES) - model(REFERENCES).mean(0)
    assert np.abs(values.sum(1) - change.detach().numpy()).max() < 1e-5
    with pytest.raises(InputError, match=r"raises \w+Error for the sample.*test_decisions.py:"):
        explainer.shap_values(SAMPLES + 1000)


def test_the_explainer_of_many_samples_refuses_one_of_them() -> None:
    explainer = fxshap.DeepExplainer(fxshap.make_explainable(Asserts()), REFERENCES)
    explainer.shap_values(SAMPLES)
    with pytest.raises(InputError, match="raises AssertionError for the sample"):
        explainer.shap_values(torch.cat([SAMPLES, SAMPLES + 1000]))


def test_references_are_checked_once_in_an_explanation() -> None:
    class Counts(Asserts):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x)

    explainable = fxshap.make_explainable(Counts(), REFERENCES)
    explainer = fxshap.DeepExplainer(explainable, REFERENCES)
    explainer.shap_values(SAMPLES)
    Counts.calls = 0
    explainer.shap_values(SAMPLES)
    assert Counts.calls <= 2  # the references and the samples


def test_a_number_that_matters_for_one_sample_only_is_found_there() -> None:
    explainer = shap.DeepExplainer(fxshap.make_explainable(Narrow()), REFERENCES)
    explainer.shap_values(SAMPLES)
    sample = SAMPLES.clone()
    sample[0, 0] = 7.2
    with pytest.raises(InputError, match=r"computes something else for the sample.*7\.0 < float"):
        explainer.shap_values(sample)


@pytest.mark.parametrize("rows", [1, 5])
def test_models_that_take_no_single_row_are_checked_in_batches(rows):
    model, references = AssertsAndSqueezes(), REFERENCES[:rows]
    explainable = fxshap.make_explainable(model)
    values = shap.DeepExplainer(explainable, references).shap_values(SAMPLES)
    change = model(SAMPLES) - model(REFERENCES)[:rows].mean(0)
    np.testing.assert_allclose(values.sum(1), change.detach(), atol=1e-6)
