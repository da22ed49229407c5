"""Other attribution tools get the plain model: `make ecosystem`."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torchcam.methods import GradCAM as TorchCAM
from zennit.attribution import Gradient, IntegratedGradients
from zennit.composites import EpsilonPlusFlat

import fxshap


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.second, self.head = nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(self.act(self.first(x)))).mean((2, 3)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGET = torch.eye(4)[[1, 1]]


def with_zennit_rules(model: nn.Module) -> np.ndarray:
    with Gradient(model, EpsilonPlusFlat()) as attributor:
        return attributor(X, TARGET)[1].numpy()


def with_zennit_integrated(model: nn.Module) -> np.ndarray:
    with IntegratedGradients(model) as attributor:
        return attributor(X, TARGET)[1].numpy()


def with_grad_cam(model: nn.Module) -> np.ndarray:
    targets = [ClassifierOutputTarget(1)] * 2
    return GradCAM(model, target_layers=[model.second])(input_tensor=X, targets=targets)


def with_grad_cam_plus_plus(model: nn.Module) -> np.ndarray:
    targets = [ClassifierOutputTarget(1)] * 2
    return GradCAMPlusPlus(model, target_layers=[model.second])(input_tensor=X, targets=targets)


def with_torchcam(model: nn.Module) -> np.ndarray:
    with TorchCAM(model, target_layer=model.second) as extractor:
        return extractor(1, model(X[:1]))[0].numpy()


@pytest.mark.parametrize(
    "method",
    [
        with_zennit_rules, with_zennit_integrated, with_grad_cam, with_grad_cam_plus_plus,
        with_torchcam,
    ],
)  # fmt: skip
def test_other_tools_get_the_plain_model(method: Callable[[nn.Module], np.ndarray]) -> None:
    model = Model().eval()
    expected = method(model)
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(method(fxshap.make_explainable(model)), expected)
