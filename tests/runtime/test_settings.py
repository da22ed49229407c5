"""A model is captured again when a setting has changed, and only then."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from captum.attr import DeepLift
from torch import Tensor, nn

import fxshap
from fxshap.runtime.settings import settings_of
from fxshap.state import restore_state

SAMPLES, REFERENCES = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Adjustable(nn.Module):
    """Attributes that a user sets, and attributes that ``forward`` assigns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.mode, self.temperature, self.activation = "tanh", 1.0, torch.tanh
        self.options = {"powers": [2, torch.tensor(1.5)]}
        self.config = SimpleNamespace(scale=1.0)
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.calls, self.stored = self.calls + 1, h.detach()
        self.seen.append(len(x))
        h = self.activation(h) if self.mode == "tanh" else h.sin()
        power, factor = self.options["powers"]
        return self.last(h**power * factor) / self.temperature * self.config.scale


def tripled(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 3


CHANGES = {
    "string": lambda model: setattr(model, "mode", "sin"),
    "number": lambda model: setattr(model, "temperature", 0.5),
    "function": lambda model: setattr(model, "activation", torch.sigmoid),
    "number_in_a_dict_of_lists": lambda model: model.options["powers"].__setitem__(0, 3),
    "tensor_in_a_dict_of_lists": lambda model: model.options.update(powers=[2, torch.tensor(9.0)]),
    "namespace": lambda model: setattr(model.config, "scale", 2.0),
    "hook": lambda model: model.first.register_forward_hook(tripled),
    "hook_before": lambda model: model.last.register_forward_pre_hook(lambda m, args: args[0] ** 3),
    "forward": lambda model: setattr(model, "forward", lambda x: model.last(model.first(x).exp())),
    "module": lambda model: setattr(model, "last", nn.Sequential(nn.GELU(), nn.Linear(6, 2))),
}


def made() -> tuple[Adjustable, fxshap.ExplainableModule]:
    model = Adjustable().eval()
    return model, fxshap.make_explainable(model)


def assert_adds_up(model: nn.Module, explainable: nn.Module) -> None:
    """Captum does not check that attributions add up."""
    values = DeepLift(explainable).attribute(SAMPLES, REFERENCES, target=1).sum(1)
    outputs = []
    for inputs in (SAMPLES, REFERENCES):  # from the same state
        with restore_state(model), torch.no_grad():
            outputs.append(model(inputs)[:, 1])
    change = outputs[0] - outputs[1]
    assert (values - change).abs().max() <= 1e-5 * max(change.abs().max(), 1)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_explained(name):
    model, explainable = made()
    assert_adds_up(model, explainable)
    CHANGES[name](model)
    assert_adds_up(model, explainable)
    assert len(explainable._calls.captures.engines) == 2


def test_calls_of_the_model_change_no_setting():
    model, explainable = made()
    assert_adds_up(model, explainable)
    for _ in range(2):
        model(torch.randn(7, 4))
        assert_adds_up(model, explainable)
    assert len(explainable._calls.captures.engines) == 1


class Stored(nn.Module):
    """Activations that are kept as an array, to look at them later."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        self.activations = y.detach().numpy()
        return y


def test_arrays_that_the_model_stores_are_no_constants():
    model = Stored().eval()
    explainable = fxshap.make_explainable(model)
    for _ in range(2):
        model(torch.randn(7, 4))
        assert_adds_up(model, explainable)
    assert len(explainable._calls.captures.engines) == 1


class Hidden(nn.Module):
    """A hidden state that is kept from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.state = nn.Linear(4, 2), 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x) + self.state)
        self.state = y.detach().mean(0)
        return y


def test_a_changed_hidden_state_is_explained():
    model = Hidden().eval()
    explainable = fxshap.make_explainable(model)
    for _ in range(2):
        assert_adds_up(model, explainable)
        model(torch.randn(9, 4) + 1)
    assert_adds_up(model, explainable)


def test_settings_are_compared_by_value_where_that_is_possible():
    model = Adjustable()
    before = settings_of(model, set())
    model.options = copy.copy(model.options)
    model.config = SimpleNamespace(scale=1.0)
    assert settings_of(model, set()) == before
    model.config.scale = 1
    assert settings_of(model, set()) != before  # an integer is not a float
    assert settings_of(model, {(model, "config")}) == settings_of(model, {(model, "config")})


def test_large_containers_are_compared_by_identity():
    model = nn.Linear(1, 1)
    model.vocabulary = dict.fromkeys(range(5000))
    before = settings_of(model, set())
    model.vocabulary[0] = 1
    assert settings_of(model, set()) == before
    model.vocabulary = dict(model.vocabulary)
    assert settings_of(model, set()) != before
