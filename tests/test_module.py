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
from fxshap.errors import OptionError
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
    created = {"flattened": 1, "inputs checked": 1, "output checked": 1}
    assert steps == [Counter({**created, "sorted into explained and bound": 1})]

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


# --- the user's own names -----------------------------------------------------------------------


class Layers(nn.Module):
    """A stack of layers under the names that Hugging Face networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Named(nn.Module):
    """Children that have the names of attributes that wrappers often own."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.model = Layers()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))
        self.names = names

    def forward(self, x):
        x = self.model(x)
        for name in self.names:
            x = x + getattr(self, name)(x)
        return x


def test_submodules_are_those_of_the_users_model():
    model = Named("output", "mode", "entry", "bound", "probe").eval()
    explainable = fxshap.make_explainable(model)
    assert explainable.get_submodule("model.layers.0") is model.model.layers[0]
    for name in ("model", "output", "mode", "entry", "bound", "probe"):
        assert explainable.get_submodule(name) is getattr(model, name)
        assert getattr(explainable, name) is getattr(model, name)
    assert explainable.get_parameter("output.weight") is model.output.weight
    values = shap.DeepExplainer(explainable, torch.randn(5, 4)).shap_values(torch.randn(2, 4))
    assert values.shape == (2, 4, 4)


def test_a_child_that_a_public_method_hides_is_warned_of():
    model = Named("report")
    with pytest.warns(UserWarning, match=r"ExplainableModule.report hides the child 'report'"):
        explainable = fxshap.make_explainable(model)
    assert explainable.get_submodule("report") is model.report


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "model", "input_names": "x"}, "input_names has no effect with layer"),
        ({"rule": "other"}, "rule is 'rescale' or 'variance', not 'other'"),
        ({"refine": -1}, "refine counts pairs of coalitions"),
        ({"refine": True}, "refine counts pairs of coalitions"),
        ({"reference_batch_size": 0}, "reference_batch_size is a number of rows"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        fxshap.make_explainable(Named(), **options)


def test_a_seed_without_coalitions_is_refused():
    with pytest.raises(OptionError, match="seed has no effect without coalitions"):
        fxshap.Refinement(0, seed=1)
