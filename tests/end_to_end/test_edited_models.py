"""A model edited after make_explainable: weights, layers, modes and parametrizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxshap
from tests.end_to_end.small_models import REFERENCES, SAMPLES, Model, assert_as_new, data, values
from tests.helpers import assert_exact, assert_same_values


def another_layer(model: Model) -> None:
    model.hidden = nn.Linear(4, 8).double()


def another_kind_of_layer(model: Model) -> None:
    model.act = nn.Softplus().double()


def wider(model: Model) -> None:
    model.hidden, model.head = nn.Linear(4, 5).double(), nn.Linear(5, 2).double()
    model.norm = nn.BatchNorm1d(5).double().eval()


def without_a_layer(model: Model) -> None:
    model.norm = nn.Identity()


def trained_and_back(model: Model) -> None:
    model.train()
    model(data(9, 7))
    model.eval()


def frozen(model: Model) -> None:
    model.requires_grad_(False)


EDITS = [another_layer, another_kind_of_layer, wider, without_a_layer, trained_and_back, frozen]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edited_after_an_explanation(model, edit):
    explainable = fxshap.make_explainable(model)
    values(explainable)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        edit(model)
    assert_as_new(explainable)


@pytest.mark.parametrize("eval_", ["explainable", "model"])
def test_modes_toggled_through_either(model, eval_):
    """SHAP explains in evaluation mode, whatever was before."""
    explainable = fxshap.make_explainable(model)
    expected = values(explainable)
    (explainable if eval_ == "model" else model).train()
    assert_same_values(values(explainable), expected)
    assert not model.training and not model.drop.training


def old_weight_norm(model: Model) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.hidden)


PARAMETRIZATIONS: dict[str, tuple[Callable[[Model], Any], Callable[[Model], Any]]] = {
    "weight_norm": (
        lambda model: parametrizations.weight_norm(model.hidden),
        lambda model: parametrize.remove_parametrizations(model.hidden, "weight"),
    ),
    "spectral_norm": (
        lambda model: parametrizations.spectral_norm(model.hidden).eval(),
        lambda model: parametrize.remove_parametrizations(model.hidden, "weight"),
    ),
    "old weight_norm": (
        old_weight_norm, lambda model: nn.utils.remove_weight_norm(model.hidden)
    ),
    "pruned": (
        lambda model: prune.l1_unstructured(model.hidden, "weight", 0.5),
        lambda model: prune.remove(model.hidden, "weight"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_parametrization_added_and_removed(model, name):
    add, remove = PARAMETRIZATIONS[name]
    explainable = fxshap.make_explainable(model)
    values(explainable)
    for edit in (add, remove):
        edit(model)
        found = assert_exact(model, explainable, [REFERENCES], [SAMPLES], 1e-13)
        assert_same_values(found, values(fxshap.make_explainable(model)))
    with torch.no_grad():
        model.hidden.weight.mul_(2)
    assert_as_new(explainable)
