"""Selections along one dimension become one operation in the graph of the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from fxshap.verification.metrics import additivity_error

aten = torch.ops.aten


class Steps(nn.Module):
    """Combine steps of a sequence of shape (batch, 6, 3) by a function of the sequence."""

    def __init__(self, combine: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.combine = nn.Linear(3, 3), combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(torch.tanh(self.first(x))).sum((1, 2), keepdim=True).flatten(1)


def loop(h: Tensor) -> Tensor:
    state = torch.zeros_like(h[:, 0])
    for t in range(h.shape[1]):
        state = torch.sigmoid(state * h[:, t] + h[:, t])
    return state.unsqueeze(1)


JOINED = {
    "all": loop,
    "from the end": lambda h: torch.stack([h[:, -t - 1].exp() * h[:, t] for t in range(6)], 1),
    "half": lambda h: (h[:, 0] * h[:, 2] * h[:, 4]).unsqueeze(1),
    "another dimension": lambda h: (h[..., 0] * h[..., 1] + h[..., 2]).unsqueeze(1),
    "nested": lambda h: (
        (h[:, 0][:, 1] * h[:, 1][:, 0] * h[:, 2][:, 2])[:, None, None]
        + (h[:, 3] * h[:, 4] * h[:, 5]).unsqueeze(1)
    ),
}
KEPT = {
    "one": lambda h: h[:, 2].square().unsqueeze(1),
    "few": lambda h: (h[:, 0] * h[:, 5]).unsqueeze(1),
}


@pytest.mark.parametrize("name", [*JOINED, *KEPT])
def test_selections_are_joined_if_they_are_at_least_half(name: str) -> None:
    torch.manual_seed(0)
    model = Steps({**JOINED, **KEPT}[name]).double()
    background, samples = torch.randn(5, 6, 3).double(), torch.randn(3, 6, 3).double()
    explainable = fxshap.make_explainable(model)
    values = shap.DeepExplainer(explainable, background).shap_values(samples)
    assert additivity_error(model, background, samples, [values]) < 1e-12
    targets = [node.target for node in explainable.rescaled_graph.graph.nodes]
    assert (aten.unbind.int in targets) == (name in JOINED)
    if name not in ("nested",):
        assert (aten.select.int in targets) == (name in KEPT)
