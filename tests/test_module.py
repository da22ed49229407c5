"""One explanation through the layers: each call is flattened once and checked once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import shap
import torch
from torch import nn

import fxshap
from fxshap import calls
from fxshap.frontend.arguments import Arguments, Call

BACKGROUND, SAMPLES = torch.randn(4, 3), torch.randn(2, 3)

#: What a call of the explainable model goes through, and where it is looked up.
STEPS: dict[str, tuple[Any, str]] = {
    "flattened": (Call, "of"),
    "sorted into explained and bound": (Arguments, "of"),
    "inputs checked": (calls, "check_inputs"),
    "output checked": (calls, "check_output"),
    "rows checked": (calls, "check_rows"),
}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """One counter of the steps for each call; a call begins when a counter is appended."""
    counters: list[Counter[str]] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counters[-1][name] += 1
            return function(*args, **kwargs)

        return counted

    for name, (owner, attribute) in STEPS.items():
        monkeypatch.setattr(owner, attribute, counting(name, getattr(owner, attribute)))
    return counters


def test_each_call_of_shap_is_flattened_once_and_checked_once(steps: list[Counter[str]]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    explainable = fxshap.make_explainable(model)
    explainable.register_forward_pre_hook(lambda *_: steps.append(Counter()))
    explainer = shap.DeepExplainer(explainable, BACKGROUND)
    assert steps == [Counter({"flattened": 1, "inputs checked": 1, "output checked": 1})]

    steps.clear()
    explainer.shap_values(SAMPLES)
    explained = Counter(
        {
            "flattened": 1,
            "sorted into explained and bound": 1,
            "inputs checked": 1,
            "rows checked": 1,
        }
    )
    kinds = Counter(tuple(sorted(step.items())) for step in steps)
    assert kinds[tuple(sorted(explained.items()))] == len(SAMPLES) * 2  # for each output
    assert all(max(step.values()) == 1 for step in steps)


def test_an_ordinary_call_is_flattened_once_and_not_checked(steps: list[Counter[str]]) -> None:
    explainable = fxshap.make_explainable(nn.Linear(3, 2))
    steps.append(Counter())
    explainable(SAMPLES)
    assert steps == [Counter({"flattened": 1})]
