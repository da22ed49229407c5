"""NumPy functions of tensors, in a model that holds arrays."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fxshap
from fxshap.capture.numpy_functions import OVERRIDE
from tests.helpers import assert_exact

FUNCTIONS = {
    "product": lambda h, array: h * array,
    "sum and quotient": lambda h, array: (h + array - 1) / array,
    "power": lambda h, array: h.abs() ** array,
    "matrix product": lambda h, array: h @ np.diag(array),
    "exp": lambda h, array: np.exp(-h.square()),
    "maximum": lambda h, array: np.maximum(h, array),
    "a number": lambda h, array: np.float64(2) * h * np.sqrt(6),
}


class WithArray(nn.Module):
    """A network that computes with an array between two layers."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.array = np.linspace(0.5, 2, 6)
        self.function = function

    def forward(self, x):
        return self.out(self.function(self.into(x).tanh(), self.array))


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_arrays_add_up(name):
    model = WithArray(FUNCTIONS[name]).double()
    explainable = fxshap.make_explainable(model, progress=False)
    references, samples = torch.randn(4, 4).double(), torch.randn(3, 4).double()
    assert_exact(model, explainable, [references], [samples], 1e-12)
    assert not hasattr(FakeTensor, OVERRIDE)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_a_changed_array_is_captured_again():
    model = WithArray(FUNCTIONS["product"]).double()
    explainable = fxshap.make_explainable(model, progress=False)
    references, samples = torch.randn(4, 4).double(), torch.randn(3, 4).double()
    for factor in (1, -3):
        model.array *= factor
        assert_exact(model, explainable, [references], [samples], 1e-12)
