"""What ``refine="auto"`` chooses."""

from __future__ import annotations

import numpy as np
import pytest
import shap
import torch
from torch import nn

import fxshap
from fxshap.runtime import engine as engine_module
from fxshap.runtime.budget import Speed
from fxshap.verification.shapley import shapley_values

SPEED = Speed(row=1e-3, run=1e-2, backward=1e-1)


def explain(
    monkeypatch: pytest.MonkeyPatch, features: int, budget: float | None
) -> tuple[object, np.ndarray, np.ndarray]:
    """Return what was chosen, the values and the exact values, at a given speed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 8), nn.GELU(), nn.Linear(8, 1)).double()
    x, r = torch.randn(1, features).double(), torch.randn(1, features).double()
    chosen, choose = [], engine_module.refinement_within_budget
    monkeypatch.setattr(engine_module, "measure_speed", lambda *_: SPEED)
    monkeypatch.setattr(
        engine_module,
        "refinement_within_budget",
        lambda *arguments: chosen.append(choose(*arguments)) or chosen[-1],
    )
    refinement = fxshap.Refinement("auto", budget=budget)
    explainable = fxshap.make_explainable(model, refine=refinement)
    values = shap.DeepExplainer(explainable, r).shap_values(x)
    exact = shapley_values(model, x[0], r[0]).numpy()
    return chosen[0].coalitions, values[0], exact


@pytest.mark.parametrize(
    ("features", "budget", "chosen"),
    [
        (8, None, "exact"),  # 256 rows take 0.256 s of the default, which is 1 s
        (8, 0.26, "exact"),
        (8, 0.25, 0),  # a pair takes five passes and two runs, 0.52 s
        (12, 0.53, 1),
        (12, 1.1, 2),
        (12, 3.9, 8),
        (12, 4.2, "exact"),
    ],
)
def test_the_nearest_that_fits_is_chosen(
    monkeypatch: pytest.MonkeyPatch, features: int, budget: float | None, chosen: object
) -> None:
    choice, values, exact = explain(monkeypatch, features, budget)
    assert choice == chosen
    assert np.abs(values.sum(0) - exact.sum(0)).max() < 1e-12
    if chosen == "exact":
        assert np.abs(values - exact).max() < 1e-12


def test_the_speed_of_a_model_is_measured_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    explainable = fxshap.make_explainable(model, refine="auto")
    x, r = torch.randn(2, 6), torch.randn(3, 6)
    values = shap.DeepExplainer(explainable, r).shap_values(x)
    speed = explainable._calls.captures.latest.speed
    assert speed is not None and min(speed.row, speed.run, speed.backward) > 0
    batched = fxshap.DeepExplainer(explainable, r).shap_values(x)
    assert np.abs(values - batched).max() < 1e-6
    assert explainable._calls.captures.latest.speed is speed
