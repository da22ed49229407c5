"""A call that fails, in the model, a rule or SHAP, leaves the explainable model as good as new."""

from __future__ import annotations

from typing import Any

import pytest
import shap
import torch
from shap.explainers._deep import deep_pytorch

import fxshap
from fxshap.errors import RuleError
from fxshap.rules.core.registry import RULES, Rule
from tests.end_to_end.small_models import REFERENCES, SAMPLES, assert_as_new, values
from tests.helpers import assert_same_state, assert_same_values, state_of

TROUBLES = [ValueError("the model's own"), KeyboardInterrupt(), torch.OutOfMemoryError("memory")]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("captured", [False, True], ids=["before capture", "after capture"])
def test_an_exception_in_the_users_model(model, captured, trouble):
    explainable = fxshap.make_explainable(model)
    if captured:
        values(explainable)
    before = state_of(model)
    explainer = shap.DeepExplainer(explainable, REFERENCES)
    model.trouble = trouble
    with pytest.raises(type(trouble)):  # the check of additivity calls it, if no capture does
        explainer.shap_values(SAMPLES)
    with pytest.raises(type(trouble)):
        shap.DeepExplainer(explainable, REFERENCES)
    model.trouble = None
    assert_same_state(model, before)
    assert_as_new(explainable)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("call", [1, 4])
def test_an_exception_in_a_rule(model, monkeypatch, call, error):
    explainable = fxshap.make_explainable(model)
    before = state_of(model)
    rule, calls = RULES[torch.ops.aten.tanh], []

    def fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return rule.backward(*args)

    monkeypatch.setitem(RULES, torch.ops.aten.tanh, Rule("fails", fails))
    with pytest.raises(RuleError if error is ZeroDivisionError else error):
        values(explainable)
    assert_same_state(model, before)
    monkeypatch.undo()
    assert_as_new(explainable)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_an_exception_between_samples(model, monkeypatch, calls, error):
    explainable = fxshap.make_explainable(model)
    before = state_of(model)
    gradient, done = deep_pytorch.PyTorchDeep.gradient, []

    def broken_off(self: Any, *args: Any) -> Any:
        if len(done) == calls:
            raise error
        done.append(1)
        return gradient(self, *args)

    explainer = shap.DeepExplainer(explainable, REFERENCES)
    monkeypatch.setattr(deep_pytorch.PyTorchDeep, "gradient", broken_off)
    with pytest.raises(error):
        explainer.shap_values(SAMPLES)
    monkeypatch.undo()
    assert_same_state(model, before)
    assert torch.equal(explainable(SAMPLES), model(SAMPLES))
    assert_same_values([explainer.shap_values(SAMPLES)], values(fxshap.make_explainable(model)))
    assert_as_new(explainable)
