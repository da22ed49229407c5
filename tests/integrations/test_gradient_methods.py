"""Methods of ordinary gradients get the ordinary model."""

import captum.attr as ca
import numpy as np
import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from tests.integrations.cases import BACKGROUND, ONE_HOT, SAMPLES, build

pytestmark = [
    pytest.mark.usefixtures("unchanged"),
    pytest.mark.filterwarnings(
        "ignore:Setting forward, backward hooks",
        "ignore:Setting backward hooks",
        "ignore:Input Tensor",
    ),
]


GRADIENTS = {
    "saliency": lambda m, x: ca.Saliency(m).attribute(x, target=(1, 2)),
    "input_x_gradient": lambda m, x: ca.InputXGradient(m).attribute(x, target=(1, 2)),
    "integrated_gradients": lambda m, x: ca.IntegratedGradients(m).attribute(x, target=(1, 2)),
    "gradient_shap": lambda m, x: ca.GradientShap(m).attribute(x, BACKGROUND, target=(1, 2)),
    "guided_backprop": lambda m, x: ca.GuidedBackprop(m).attribute(x, target=(1, 2)),
    "deconvolution": lambda m, x: ca.Deconvolution(m).attribute(x, target=(1, 2)),
    "guided_grad_cam": lambda m, x: ca.GuidedGradCam(m, m.conv).attribute(x, target=(1, 2)),
    "layer_grad_cam": lambda m, x: ca.LayerGradCam(m, m.conv).attribute(x, target=(1, 2)),
    "layer_gradient_x_activation": lambda m, x: ca.LayerGradientXActivation(m, m.mix).attribute(
        x, target=(1, 2)
    ),
    "layer_integrated_gradients": lambda m, x: ca.LayerIntegratedGradients(m, m.mix).attribute(
        x, target=(1, 2)
    ),
    "neuron_gradient": lambda m, x: ca.NeuronGradient(m, m.mix).attribute(x, 2),
    "feature_ablation": lambda m, x: ca.FeatureAblation(m).attribute(x, target=(1, 2)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_captum_gradient_methods_get_the_plain_model(model, explainable, name):
    def values(module: nn.Module) -> Tensor:
        torch.manual_seed(0)
        np.random.seed(0)
        return GRADIENTS[name](module, SAMPLES)

    assert torch.equal(values(explainable), values(model))


def test_shap_gradient_explainer_of_a_layer_gets_the_plain_model():
    flat = nn.Sequential(build().float(), nn.Flatten())
    explainable = fxshap.make_explainable(flat)

    def values(module: nn.Module) -> np.ndarray:
        explainer = shap.GradientExplainer((module, flat[0].mix), BACKGROUND.float())
        return explainer.shap_values(SAMPLES.float(), nsamples=10, rseed=0)

    np.testing.assert_array_equal(values(explainable), values(flat))


def test_tangermeme_saliency_gets_the_plain_model(sequences, explained):
    module = pytest.importorskip("tangermeme.saliency", reason="tangermeme 1.2 has no saliency")
    ours, theirs = (
        module.saliency(model, ONE_HOT, device="cpu") for model in (explained, sequences)
    )
    assert torch.equal(ours, theirs)
