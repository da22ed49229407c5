"""Fixtures of the explainable models that all libraries are tried on."""

import pytest
import torch
from torch import nn

import fxshap
from tests.helpers import assert_no_shap_hooks, assert_same_state, hooks, state_of
from tests.integrations.cases import BACKGROUND, REFERENCES, SAMPLES, Sequences, build


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build()


@pytest.fixture(scope="module")
def explainable(model) -> nn.Module:
    return fxshap.make_explainable(model)


@pytest.fixture(scope="module")
def flat(model) -> nn.Module:
    """The same model with outputs of two dimensions, the only ones that SHAP takes."""
    return fxshap.make_explainable(model, output=lambda y: y.flatten(1))


@pytest.fixture
def unchanged(model, explainable, flat):
    """Check after a test that the model is as it was, and that no library is active."""
    before = state_of(model)
    yield
    for x in (SAMPLES, REFERENCES, BACKGROUND):
        x.requires_grad_(False)  # which Captum does not do when it fails
    assert_same_state(model, before)
    for module in (explainable, flat):
        assert_no_shap_hooks(module)
        assert not hooks(module) and not hooks(module._probe)
        assert module.active_library == "plain"


@pytest.fixture(scope="module")
def sequences() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Sequences().double().eval()


@pytest.fixture(scope="module")
def explained(sequences) -> nn.Module:
    return fxshap.make_explainable(sequences)
