"""Equivalent nodes get one form."""

import captum.attr as captum
import pytest
import torch
from torch import Tensor, nn

import fxshap
from tests.helpers import assert_exact


class Pooled(nn.Module):
    """Global pooling, and all dimensions of size 1 removed, as tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(torch.relu(self.conv(x))).squeeze())


class LastState(nn.Module):
    """The final state of a GRU, whose first dimension counts layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[1].squeeze())


MODELS = {"pooled": (Pooled, (1, 6, 6)), "last state": (LastState, (3, 2))}


@pytest.mark.parametrize("name", MODELS)
def test_squeezing_without_a_dimension_keeps_a_batch_of_one_row(name):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    background = torch.randn(5, *shape, dtype=torch.float64)
    samples = torch.randn(2, *shape, dtype=torch.float64)
    explainable = fxshap.make_explainable(model)
    (values,) = assert_exact(model, explainable, [background], [samples], 1e-12)

    one = fxshap.DeepExplainer(model, background).shap_values(samples[:1])
    torch.testing.assert_close(torch.tensor(one), torch.tensor(values[:1]))

    row, reference = samples[:1], background[:1]
    found = captum.DeepLift(explainable).attribute(row, reference, target=1)
    twice = model(torch.cat([row, row]))[0, 1] - model(torch.cat([reference, reference]))[0, 1]
    torch.testing.assert_close(found.sum(), twice)
