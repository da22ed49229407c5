"""A small model and the check of an error, for the tests of errors."""

import pytest
import shap
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from tests.helpers import (
    assert_no_shap_hooks,
    assert_same_state,
    assert_same_values,
    explain,
    state_of,
)

torch.manual_seed(0)
REFERENCES = torch.randn(5, 4)
SAMPLES = torch.randn(2, 4)


class Model(nn.Module):
    """One hidden GELU layer whose result goes through `end`, given the hidden values too."""

    def __init__(self, end=lambda y, h: y) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.hidden = nn.Linear(4, 6)
            self.head = nn.Linear(6, 3)
        self.end = end
        self.eval()

    def forward(self, x: Tensor):
        h = F.gelu(self.hidden(x))
        return self.end(self.head(h), h)


class FunctionModule(nn.Module):
    """A function as a submodule, so that errors can name it."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def assert_works_as_new(explainable: nn.Module) -> None:
    """Check that an explainable model explains as a new one does."""
    found = explain(explainable, [REFERENCES], [SAMPLES])
    assert_same_values(
        found, explain(fxshap.make_explainable(explainable.original_model), [REFERENCES], [SAMPLES])
    )
    assert_no_shap_hooks(explainable)


def assert_raises(model: nn.Module, error: type[Exception], message: str, **options) -> str:
    """Check that explaining a model raises `error` and leaves it as it was; return the message."""
    explainable = fxshap.make_explainable(model, **options)
    before = state_of(model)
    with pytest.raises(error, match=message) as raised:
        shap.DeepExplainer(explainable, REFERENCES).shap_values(SAMPLES)
    assert_no_shap_hooks(explainable)
    assert_same_state(model, before)
    return str(raised.value)
