"""NaN and infinity: the error names the input, the weight or the output that has it."""

from __future__ import annotations

import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from fxshap.errors import InputError, OutputError, WeightError
from tests.end_to_end.small_models import REFERENCES, SAMPLES, assert_as_new, data, values
from tests.helpers import assert_exact, explain

BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["sample", "references"])
def test_the_input_with_nan_is_named(where, value):
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * b

    inputs = {"references": [REFERENCES, data(6, 4)], "sample": [SAMPLES, data(3, 5)]}
    inputs[where][1][0, 1] = value
    explainable = fxshap.make_explainable(Two())
    with pytest.raises(InputError, match=rf"input 1 of the {where} contains NaN or infinity \(row"):
        explain(explainable, inputs["references"], inputs["sample"], check_additivity=False)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["hidden.weight", "head.bias", "norm.weight"])
@pytest.mark.parametrize("captured", [False, True], ids=["before capture", "after capture"])
def test_the_weight_with_nan_is_named(model, captured, name, value):
    explainable = fxshap.make_explainable(model)
    if captured:
        values(explainable)
    before = model.get_parameter(name).detach().clone()
    model.get_parameter(name).data[1] = value
    with pytest.raises(WeightError, match=rf"'{name}' contains (NaN|infinity)"):
        shap.DeepExplainer(explainable, REFERENCES).shap_values(SAMPLES, check_additivity=False)
    model.get_parameter(name).data.copy_(before)
    assert_as_new(explainable)


@pytest.mark.parametrize("name", ["norm.running_mean", "norm.running_var"])
def test_the_buffer_with_nan_is_named(model, name):
    model.get_buffer(name)[2] = torch.nan
    with pytest.raises(WeightError, match=rf"'{name}' contains NaN"):
        shap.DeepExplainer(fxshap.make_explainable(model), REFERENCES).shap_values(
            SAMPLES, check_additivity=False
        )


class Masked(nn.Module):
    """Attention weights with a mask of -inf, which is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0, 0.0]).double())

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.mask).softmax(1) * x


def test_masks_of_minus_infinity_are_no_error():
    assert_exact(Masked(), fxshap.make_explainable(Masked()), [REFERENCES], [SAMPLES], 1e-13)


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.square(), x.log()], 1)


def test_an_output_with_nan_is_named():
    """The others have attributions."""
    explainable = fxshap.make_explainable(Logarithm())
    references, samples = REFERENCES.abs() + 0.1, SAMPLES.abs() + 0.1
    samples[1, 2] = 0
    with pytest.raises(OutputError, match=r"output 6 of the sample is NaN or infinite"):
        explain(explainable, [references], [samples], check_additivity=False)
    references[4, 0] = -1
    with pytest.raises(OutputError, match=r"output 4 of the references .* \(row 4\)"):
        explain(explainable, [references], [samples], check_additivity=False)
    squares = fxshap.make_explainable(Logarithm(), output=lambda y: y[:, :4])
    explain(squares, [references], [samples])
