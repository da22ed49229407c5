"""Ways to call a model: entries of containers, keywords, lists, and what is said of wrong calls."""

from collections import namedtuple
from dataclasses import dataclass

import captum.attr as ca
import numpy as np
import pandas as pd
import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from fxshap.errors import InputError
from fxshap.frontend.naming import InputPath, resolve_names, with_entries
from tests.networks.reports import REPORTS
from tests.networks.reports.calling import (
    TakesDict,
    TakesKeywordOnly,
    TakesKeywords,
    TakesList,
    TakesMany,
)

REFERENCES = [torch.randn(5, 6), torch.randn(5, 4)]


# --- names --------------------------------------------------------------------------------------


def test_a_name_is_a_parameter_or_an_entry_of_the_only_argument():
    assert resolve_names(TakesDict(), ("numbers", "batch.dates")) == (
        InputPath("batch", ("numbers",)),
        InputPath("batch", ("dates",)),
    )
    assert resolve_names(TakesList(), ("0", "xs.1")) == (
        InputPath("xs", (0,)),
        InputPath("xs", (1,)),
    )
    assert resolve_names(TakesKeywords(), ("numbers",)) == (InputPath("numbers"),)
    assert resolve_names(TakesKeywordOnly(), ("dates",)) == (InputPath("dates"),)


def test_a_tensor_has_no_entries():
    class Annotated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match=r"takes no 'age'; it takes x.*'parameter.entry'"):
        fxshap.make_explainable(Annotated(), input_names="age")


Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Batch:
    x: int
    y: int


@pytest.mark.parametrize(
    "container, items, expected",
    [
        (None, [(("a",), 1), (("b", "c"), 2)], {"a": 1, "b": {"c": 2}}),
        (None, [((0,), 1), ((1,), 2)], [1, 2]),
        ({"a": 1, "b": 2}, [(("b",), 3)], {"a": 1, "b": 3}),
        ((1, 2), [((1,), 3)], (1, 3)),
        ([1], [((2,), 3)], [1, None, 3]),
        (Pair(1, 2), [(("y",), 3)], Pair(1, 3)),
        (Batch(1, 2), [(("y",), 3)], Batch(1, 3)),
        ({"a": {"b": 1}}, [(("a", "c"), 2)], {"a": {"b": 1, "c": 2}}),
    ],
)
def test_entries_are_replaced_in_a_copy(container, items, expected):
    before = str(container)
    assert with_entries(container, items) == expected
    assert str(container) == before


# --- plain calls ----------------------------------------------------------------------------------


def test_a_plain_call_gives_what_the_model_gives():
    model = REPORTS["takes_dict"].build()
    named = fxshap.make_explainable(model, input_names=("numbers", "dates"))
    x, y = REFERENCES
    expected = model({"numbers": x, "dates": y})
    assert torch.equal(named(x, y), expected)
    assert torch.equal(named({"numbers": x, "dates": y}), expected)
    assert torch.equal(fxshap.make_explainable(model)({"numbers": x, "dates": y}), expected)


@pytest.mark.parametrize("name", ["takes_dict", "takes_list", "takes_keyword_only", "takes_many"])
def test_the_explainer_and_verify_name_entries_too(name):
    report = REPORTS[name]
    model = fxshap.make_explainable(report.build(), **report.options).bind(**report.bound)
    references, samples = report.inputs(4, seed=1), report.inputs(2, seed=2)
    result = fxshap.verify(model, references, samples)
    assert result.additive
    values = fxshap.DeepExplainer(model, list(references)).shap_values(list(samples))
    for ours, theirs in zip(values, result.values, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


# --- messages -------------------------------------------------------------------------------------


def explainer_of(model: nn.Module, background, **options) -> shap.DeepExplainer:
    return shap.DeepExplainer(fxshap.make_explainable(model, **options), background)


@pytest.mark.parametrize(
    "model, background, message",
    [
        (TakesMany(), REFERENCES[::-1], r"shapes \(5, 4\), \(5, 6\): RuntimeError: mat1"),
        (TakesDict(), REFERENCES, r"\(5, 6\), \(5, 4\).*only batch; name .*input_names="),
        (TakesKeywords(), REFERENCES, "takes none by position; name them with.*input_names"),
        (nn.Linear(6, 2), REFERENCES, r"2 inputs were given \(\(5, 6\), \(5, 4\)\).*only input"),
        (TakesKeywordOnly(), REFERENCES[:1], "missing 1 required keyword-only argument: 'dates'"),
        (TakesMany(), [REFERENCES[0], REFERENCES[1][:3]], r"\(5, 6\), \(3, 4\); each needs"),
        (TakesMany(), tuple(REFERENCES), "input 0 is a tuple.*several inputs are one list"),
        (nn.Linear(6, 2), np.zeros((5, 6)), r"is a ndarray.*torch.tensor\(array, dtype="),
        (nn.Linear(6, 2), pd.DataFrame(np.zeros((5, 6))), r"is a DataFrame.*table.to_numpy\(\)"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_named_with_their_shapes(model, background, message):
    with pytest.raises(InputError, match=message):
        explainer_of(model, background)


def test_the_advice_for_arrays_and_tables_works():
    array = np.random.default_rng(0).normal(size=(5, 6))
    table, model = pd.DataFrame(array), nn.Linear(6, 2)
    for background in (
        torch.tensor(array, dtype=torch.float32),
        torch.tensor(table.to_numpy(), dtype=torch.float32),
    ):
        assert explainer_of(model, background).shap_values(background).shape == (5, 6, 2)


@pytest.mark.parametrize("explain", [fxshap.DeepExplainer, lambda m, r: fxshap.verify(m, r, r)])
def test_the_explainer_and_verify_name_shapes_too(explain):
    model = fxshap.make_explainable(TakesMany())
    with pytest.raises(InputError, match=r"fails with inputs of shapes \(5, 4\), \(5, 6\)"):
        explain(model, REFERENCES[::-1])


def test_captum_gets_the_shapes_that_the_user_gave():
    model = fxshap.make_explainable(TakesMany())
    with pytest.raises(InputError, match=r"fails with inputs of shapes \(5, 4\), \(5, 6\)"):
        ca.DeepLift(model).attribute(tuple(REFERENCES[::-1]), target=0)


class FixedRows(nn.Module):
    """A recurrent layer whose first state is for a number of rows that is fixed."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.recurrent, self.head = rows, nn.GRU(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, self.rows, 4)
        return self.head(self.recurrent(x[None], state)[0][0])


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_model_of_fixed_rows_is_explained_with_as_many_references(rows):
    model, x = FixedRows(rows).eval(), torch.randn(rows, 6)
    assert explainer_of(model, torch.randn(rows, 6)).shap_values(x).shape == (rows, 6, 2)
    with pytest.raises(InputError, match=r"shapes \(5, 6\): .*Expected hidden size \(1, 5, 4\)"):
        explainer_of(model, torch.randn(5, 6))
