"""Copies, pickles and saved weights of an explainable model give the same attributions."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxshap
from tests.end_to_end.small_models import Model, values
from tests.helpers import assert_no_shap_hooks, assert_same_values


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("captured", [False, True], ids=["before capture", "after capture"])
def test_a_copy_gives_the_same_bits(model, captured, name):
    explainable = fxshap.make_explainable(model, output=0, refine=1)
    expected = values(explainable) if captured else None
    duplicate = COPIES[name](explainable)
    found = values(duplicate)
    assert_same_values(found, expected or values(explainable))
    assert_same_values(values(explainable), found)
    assert_no_shap_hooks(duplicate)


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
def test_a_copy_made_in_the_middle_of_an_explanation(model, name):
    explainable = fxshap.make_explainable(model)
    duplicates: list[Any] = []

    def duplicate(*_: Any) -> None:
        if explainable.active_library == "shap" and not duplicates:
            handle.remove()
            duplicates.append(COPIES[name](explainable))

    handle = explainable.register_forward_hook(duplicate)
    expected = values(explainable)
    assert duplicates[0].active_library == "plain"
    assert_same_values(values(duplicates[0]), expected)


def test_a_state_dict_moves_weights_and_loads_safely(model):
    explainable = fxshap.make_explainable(model)
    file = io.BytesIO()
    torch.save(explainable.state_dict(), file)
    file.seek(0)
    other = fxshap.make_explainable(Model(seed=5))
    before = values(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_values(values(other), values(explainable))
    assert not np.array_equal(values(other)[0], before[0])
