"""Sparse constants have the attributions of their dense form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxshap
from tests.helpers import assert_exact, assert_same_values, explain

MATRIX = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [0.5, 0.0, 0.0]])
REFERENCES = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(1))
SAMPLES = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(2))


class Graph(nn.Module):
    def __init__(self, matrix: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(2, 2)
        self.register_buffer("matrix", matrix)
        self.product = product
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.stack([self.product(self.matrix, row) for row in x])
        return torch.tanh(self.layer(rows)).sum(1)


PRODUCTS = {
    "torch.sparse.mm": torch.sparse.mm,
    "@": lambda a, x: a @ x,
    "torch.spmm": torch.spmm,
    "to_dense": lambda a, x: a.to_dense() @ x,
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=["coo", "csr"])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_sparse_matrix_is_explained_as_the_dense_one(
    product: Callable[[Tensor, Tensor], Tensor], layout: torch.layout
) -> None:
    model, dense = (
        Graph(MATRIX.to_sparse(layout=layout), product),
        Graph(MATRIX, lambda a, x: a @ x),
    )
    explainable = fxshap.make_explainable(model)
    values = explain(explainable, [REFERENCES], [SAMPLES])
    assert_same_values(values, explain(fxshap.make_explainable(dense), [REFERENCES], [SAMPLES]))
    assert model.matrix.layout is layout


def test_a_changed_matrix_is_captured_again() -> None:
    model = Graph(MATRIX.to_sparse(), torch.sparse.mm)
    explainable = fxshap.make_explainable(model)
    assert_exact(explainable, explainable, (REFERENCES,), (SAMPLES,), 1e-5)
    model.matrix = (2 * MATRIX).to_sparse()
    assert_exact(explainable, explainable, (REFERENCES,), (SAMPLES,), 1e-5)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_matrix_that_forward_makes_follows_its_values() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.layer = nn.Parameter(torch.rand(3)), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            indices = torch.tensor([[0, 1, 2], [2, 0, 0]])
            matrix = torch.sparse_coo_tensor(indices, self.weights, (3, 3))
            products = [torch.sparse.mm(matrix, row) for row in self.layer(x).tanh()]
            return torch.stack(products).sum(1)

    model = Attention().eval()
    explainable = fxshap.make_explainable(model)
    for _ in range(2):
        values = fxshap.DeepExplainer(explainable, REFERENCES).shap_values(SAMPLES)
        with torch.no_grad():
            change = model(SAMPLES) - model(REFERENCES).mean(0)
        assert np.abs(values.sum((1, 2)) - change.numpy()).max() < 1e-5
        model.weights.data.mul_(2)
