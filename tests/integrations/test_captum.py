"""Captum: DeepLift and its relatives, of inputs and of layers."""

import captum.attr as ca
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxshap
from fxshap.errors import InputError
from tests.helpers import explain
from tests.integrations.cases import BACKGROUND, EXACT, GATE, REFERENCES, SAMPLES, data

pytestmark = [
    pytest.mark.usefixtures("unchanged"),
    pytest.mark.filterwarnings(
        "ignore:Setting forward, backward hooks",
        "ignore:Setting backward hooks",
        "ignore:Input Tensor",
    ),
]


@pytest.mark.parametrize(
    "baselines",
    [None, 0.5, REFERENCES[:1], REFERENCES],
    ids=["zeros", "number", "one", "each"],
)
def test_captum_deep_lift(explainable, baselines):
    found, delta = ca.DeepLift(explainable).attribute(
        SAMPLES, baselines, target=(1, 2), return_convergence_delta=True
    )
    assert found.shape == SAMPLES.shape and found.abs().max() > 1e-3
    assert delta.shape == (3,) and delta.abs().max() <= EXACT


TARGETS = {
    "tuple": (0, 2),
    "tuples": [(0, 2), (1, 1), (1, 0)],
}
TARGETS_FLAT = {
    "int": 4,
    "list": [5, 0, 3],
    "tensor_of_one": torch.tensor(2),
    "tensor": torch.tensor([5, 0, 3]),
}


@pytest.mark.parametrize("method", [ca.DeepLift, ca.DeepLiftShap])
@pytest.mark.parametrize("name", [*TARGETS, *TARGETS_FLAT, "none"])
def test_captum_targets_of_every_kind(model, explainable, flat, method, name):
    chosen = flat if name in TARGETS_FLAT else explainable
    if name == "none":
        chosen = fxshap.make_explainable(model, output=lambda y: y[:, 1, 1])
    target = {**TARGETS, **TARGETS_FLAT}.get(name)
    references = REFERENCES if method is ca.DeepLift else BACKGROUND
    _, delta = method(chosen).attribute(
        SAMPLES, references, target=target, return_convergence_delta=True
    )
    assert delta.numel() == (3 if method is ca.DeepLift else 12)
    assert delta.abs().max() <= EXACT


def test_captum_deep_lift_shap_is_shaps_value(explainable, flat):
    """A baseline distribution in Captum is a background in SHAP."""
    found = ca.DeepLiftShap(explainable).attribute(SAMPLES, BACKGROUND, target=(1, 2))
    (expected,) = explain(flat, [BACKGROUND], [SAMPLES])
    np.testing.assert_allclose(found.detach().numpy(), expected[..., 5], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", [ca.DeepLift, ca.DeepLiftShap])
def test_captum_additional_arguments_are_matched_row_by_row(explainable, method):
    references = REFERENCES if method is ca.DeepLift else BACKGROUND
    options = {"target": (1, 2), "return_convergence_delta": True}
    found, delta = method(explainable).attribute(
        SAMPLES, references, additional_forward_args=(GATE, 2.0), **options
    )
    assert delta.abs().max() <= EXACT
    for row in range(3):
        chosen = slice(row, row + 1)
        one, _ = method(explainable).attribute(
            SAMPLES[chosen], references[chosen] if method is ca.DeepLift else references,
            additional_forward_args=(GATE[chosen], 2.0), **options,
        )  # fmt: skip
        torch.testing.assert_close(one[0], found[row], rtol=1e-12, atol=1e-15)


def test_captum_several_inputs_and_its_other_options(explainable):
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a * b.sigmoid()).flatten(1)

    two = fxshap.make_explainable(Two())
    inputs, baselines = (SAMPLES, data(3, 4)), (REFERENCES, data(3, 5))
    found, delta = ca.DeepLift(two).attribute(
        inputs, baselines, target=3, return_convergence_delta=True
    )
    assert len(found) == 2 and delta.abs().max() <= EXACT

    bare = ca.DeepLift(explainable, multiply_by_inputs=False)
    attributed = ca.DeepLift(explainable).attribute(SAMPLES, REFERENCES, target=(1, 2))
    multipliers = bare.attribute(SAMPLES, REFERENCES, target=(1, 2))
    torch.testing.assert_close(multipliers * (SAMPLES - REFERENCES), attributed)
    own = ca.DeepLift(explainable).attribute(
        SAMPLES, REFERENCES, target=(1, 2), custom_attribution_func=lambda m, x, r: (m[0] * 2,)
    )
    torch.testing.assert_close(own, 2 * multipliers)


LAYERS = ["conv", "act", "mix", "head"]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("name", LAYERS)
def test_captum_layers(model, explainable, name, side):
    layer = explainable.get_submodule(name)
    options = {
        "target": (1, 2),
        "attribute_to_layer_input": side == "input",
        "return_convergence_delta": True,
    }
    found, delta = ca.LayerDeepLift(explainable, layer).attribute(SAMPLES, REFERENCES, **options)
    with (
        torch.no_grad(),
        fxshap.frontend.hook_point.record_tensors(
            model, fxshap.frontend.hook_point.HookPoint(name, side)
        ) as seen,
    ):
        model(SAMPLES)
    assert found.shape == seen[0][0].shape
    assert delta.abs().max() <= EXACT
    _, delta = ca.LayerDeepLiftShap(explainable, layer).attribute(SAMPLES, BACKGROUND, **options)
    assert delta.shape == (12,) and delta.abs().max() <= EXACT


def test_captum_layers_with_additional_arguments(explainable):
    _, delta = ca.LayerDeepLift(explainable, explainable.mix).attribute(
        SAMPLES, REFERENCES, target=(1, 2), additional_forward_args=(GATE, 2.0),
        return_convergence_delta=True,
    )  # fmt: skip
    assert delta.abs().max() <= EXACT


def test_captum_neurons_raise_an_error_that_names_the_layer(model, explainable):
    with pytest.raises(InputError, match="requests the gradient of the output of 'mix' itself"):
        ca.NeuronDeepLift(explainable, model.mix).attribute(SAMPLES, 2, REFERENCES)


def test_bound_arguments_must_be_the_same_in_both_rows_of_a_pair(explainable):
    rows = torch.cat([SAMPLES, REFERENCES]).requires_grad_()
    gates = torch.cat([GATE, GATE.flip(0)])
    for call in (lambda: explainable(rows, gates), lambda: explainable(rows, gate=gates)):
        with (
            fxshap.multiplier_mode(),
            pytest.raises(InputError, match="(input 1|'gate') is not explained"),
        ):
            call()


def test_captum_lrp_finds_no_layers(explainable):
    """LRP iterates over the children of a model, and the explainable model hides the user's."""
    with pytest.raises(TypeError, match="has no rule defined"):
        ca.LRP(explainable).attribute(SAMPLES, target=(1, 2))
