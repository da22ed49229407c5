"""SHAP, Captum and tangermeme get multipliers; all other callers get the ordinary model."""

import types
from importlib.metadata import version

import captum.attr as ca
import numpy as np
import pytest
import shap
import tangermeme.deep_lift_shap as tangermeme
import torch
from shap.explainers._deep import deep_pytorch
from torch import nn

import fxshap
from fxshap.errors import RecognitionError
from tests.helpers import explain, hooks
from tests.integrations.cases import (
    BACKGROUND,
    EXACT,
    ONE_HOT,
    OPTIONS,
    REFERENCES,
    SAMPLES,
)

pytestmark = [
    pytest.mark.usefixtures("unchanged"),
    pytest.mark.filterwarnings(
        "ignore:Setting forward, backward hooks",
        "ignore:Setting backward hooks",
        "ignore:Input Tensor",
    ),
]


# --- the calling library ------------------------------------------------------------------------


def test_active_library_names_the_calling_library(flat, explained):
    modes: list[str] = []

    def note(module: nn.Module, *_) -> None:
        modes.append(module.active_library)

    with flat.register_forward_hook(note):
        shap.DeepExplainer(flat, BACKGROUND).shap_values(SAMPLES[:1])
        assert modes == ["plain", *["shap"] * 6, "plain"]
        modes.clear()
        ca.DeepLift(flat).attribute(SAMPLES, target=1, return_convergence_delta=True)
        assert modes == ["captum", "plain", "plain"]
        modes.clear()
        ca.IntegratedGradients(flat).attribute(SAMPLES, target=1, n_steps=2)
        assert set(modes) == {"plain"}
    modes.clear()
    with explained.register_forward_hook(note):
        tangermeme.deep_lift_shap(explained, ONE_HOT, **OPTIONS)
        assert set(modes) == {"tangermeme"}
    with fxshap.multiplier_mode():
        assert flat.active_library == "multiplier_mode"
    assert flat.active_library == "plain"


def test_multiplier_mode_gives_every_row_the_multiplier_of_its_own_cotangent(model, explainable):
    rows = torch.cat([SAMPLES, REFERENCES]).requires_grad_()
    with fxshap.multiplier_mode():
        outputs = explainable(rows).flatten(1)
    sample, reference = torch.autograd.grad(outputs.sum(), rows, retain_graph=True)[0].chunk(2)
    assert torch.equal(sample, reference)

    weights = torch.linspace(-1, 1, 6, dtype=torch.float64)
    cotangent = torch.cat([weights.expand(3, 6), torch.zeros(3, 6)])
    sample, reference = torch.autograd.grad(outputs, rows, cotangent)[0].chunk(2)
    f_x, f_r = (model(x).detach().flatten(1) for x in (SAMPLES, REFERENCES))
    total = (sample * (SAMPLES - REFERENCES)).sum((1, 2))
    torch.testing.assert_close(total, (f_x - f_r) @ weights, rtol=0, atol=EXACT)
    assert not reference.any()


def test_calls_without_gradient_are_plain_in_multiplier_mode(model, explainable):
    with fxshap.multiplier_mode():
        with torch.no_grad():
            assert torch.equal(explainable(SAMPLES), model(SAMPLES))
        assert torch.equal(explainable(SAMPLES), model(SAMPLES))


def test_an_explainable_model_may_be_part_of_another(flat):
    combined = nn.Sequential(flat, nn.Tanh())
    (values,) = explain(combined, [BACKGROUND], [SAMPLES])
    with torch.no_grad():
        change = combined(SAMPLES) - combined(BACKGROUND).mean(0)
    np.testing.assert_allclose(values.sum((1, 2)), change.numpy(), rtol=0, atol=EXACT)


def test_hooks_of_an_interrupted_call_are_no_request(model, flat, monkeypatch):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    explainer = shap.DeepExplainer((flat, model.mix), BACKGROUND)
    monkeypatch.setattr(deep_pytorch.PyTorchDeep, "gradient", interrupt)
    with pytest.raises(KeyboardInterrupt):
        explainer.shap_values(SAMPLES)
    assert hooks(flat._probe) and hooks(model.mix)

    found = ca.InputXGradient(flat).attribute(SAMPLES, target=5)
    assert torch.equal(found, ca.InputXGradient(model).attribute(SAMPLES, target=(1, 2)))


# --- unknown releases ---------------------------------------------------------------------------


def moved(function, module: str):
    """The same function, from a module of another name."""
    moved_function = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    moved_function.__module__ = module
    return moved_function


def assert_names_versions(call, library: str) -> None:
    """Check that there is an error that names the versions."""
    with pytest.raises(RecognitionError) as raised:
        call()
    assert f"{library} {version(library)}" in str(raised.value)
    assert f"fxshap {fxshap.__version__}" in str(raised.value)
    assert "fxshap.multiplier_mode()" in str(raised.value)


def call_shap(flat: nn.Module) -> None:
    shap.DeepExplainer(flat, BACKGROUND).shap_values(SAMPLES)


@pytest.mark.parametrize("new", ["shap.explainers._deep.hooks", "shap.explainers._deep"])
def test_shap_hooks_may_move_within_their_package(flat, monkeypatch, new):
    for name in ("add_interim_values", "deeplift_grad"):
        monkeypatch.setattr(deep_pytorch, name, moved(getattr(deep_pytorch, name), new))
    call_shap(flat)


def test_shap_hooks_from_elsewhere_are_an_error(flat, monkeypatch):
    for name in ("add_interim_values", "deeplift_grad"):
        renamed = moved(getattr(deep_pytorch, name), "shap.deep")
        monkeypatch.setattr(deep_pytorch, name, renamed)
    assert_names_versions(lambda: call_shap(flat), "shap")


def test_shap_without_hooks_is_an_error(flat, monkeypatch):
    monkeypatch.setattr(deep_pytorch.PyTorchDeep, "add_handles", lambda *_: [])
    assert_names_versions(lambda: call_shap(flat), "shap")


def test_captum_without_hooks_is_an_error(explainable, monkeypatch):
    monkeypatch.setattr(ca.DeepLift, "_register_hooks", lambda *_: None)
    call = ca.DeepLift(explainable).attribute
    assert_names_versions(lambda: call(SAMPLES, REFERENCES, target=(1, 2)), "captum")


def test_captum_hooks_from_elsewhere_are_an_error(explainable, monkeypatch):
    for name in ("_forward_hook", "_forward_pre_hook"):
        renamed = moved(getattr(ca.DeepLift, name), "captum.attr.rescale")
        monkeypatch.setattr(ca.DeepLift, name, renamed)
    call = ca.DeepLift(explainable).attribute
    assert_names_versions(lambda: call(SAMPLES, REFERENCES, target=(1, 2)), "captum")


def test_tangermeme_without_hooks_is_an_error(explained, monkeypatch):
    monkeypatch.setattr(tangermeme, "_register_hooks", lambda module: None)
    call = tangermeme.deep_lift_shap
    assert_names_versions(lambda: call(explained, ONE_HOT, **OPTIONS), "tangermeme")


def test_an_unknown_release_works_in_multiplier_mode(flat, monkeypatch):
    monkeypatch.setattr(deep_pytorch.PyTorchDeep, "add_handles", lambda *_: [])
    with fxshap.multiplier_mode():
        call_shap(flat)
