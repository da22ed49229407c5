"""The messages of the page "Troubleshooting" are real, and fxshap explains the models."""

import re
import warnings
from pathlib import Path

import pytest
import shap
import torch
import torch.nn.functional as F
from captum.attr import DeepLift
from torch import Tensor, nn

import fxshap
from tests.helpers import Between, assert_exact

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
BACKGROUND, SAMPLES = torch.randn(5, 4), torch.randn(2, 4)


class Reused(nn.Module):
    """One module that is called twice, with tensors of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.act = nn.Linear(4, 6), nn.Linear(6, 12), nn.ReLU()
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.second(self.act(self.first(x)))))


def by_shap(model: nn.Module) -> None:
    shap.DeepExplainer(model, BACKGROUND).shap_values(SAMPLES)


def by_captum(model: nn.Module) -> None:
    DeepLift(model).attribute(SAMPLES, BACKGROUND[:2], target=0)


class Constant(nn.Module):
    """A model that does not use its input."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.ones_like(x))


def without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        by_shap(model)


def on_arrays(model: nn.Module) -> None:
    shap.DeepExplainer(model, BACKGROUND).shap_values(SAMPLES.numpy())


def on_other_shapes(model: nn.Module) -> None:
    shap.DeepExplainer(model, BACKGROUND).shap_values(torch.randn(2, 5))


def on_one_row(model: nn.Module) -> None:
    shap.DeepExplainer(model, BACKGROUND).shap_values(SAMPLES[0])


CASES = {
    "sum": (
        lambda: Between(F.gelu),
        by_shap,
        "The SHAP explanations do not sum up to the model's output!",
    ),
    "module": (lambda: Between(nn.LayerNorm(6)), by_shap, "unrecognized nn.Module: LayerNorm"),
    "in place": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)),
        by_shap,
        "BackwardHookFunction is a view and is being modified inplace",
    ),
    "reused in Captum": (
        Reused,
        by_captum,
        "was detected that does not contain some of the input/output attributes",
    ),
    "not used": (
        Constant,
        by_captum,
        "The differentiated Tensor at index 0 appears to not have been used in the graph",
    ),
    "without gradients": (
        lambda: Between(F.gelu),
        without_gradients,
        "element 0 of tensors does not require grad",
    ),
    "arrays": (
        lambda: Between(F.gelu),
        on_arrays,
        "Can't call numpy() on Tensor that requires grad",
    ),
    "sizes": (Reused, by_shap, "The size of tensor a"),
    "other shapes": (
        lambda: nn.Linear(4, 2),
        on_other_shapes,
        "Sizes of tensors must match except in dimension 0",
    ),
    "one row": (
        lambda: nn.Linear(4, 2),
        on_one_row,
        "Tensors must have same number of dimensions",
    ),
}


@pytest.mark.parametrize("build, explain, message", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_message_is_that_of_the_page(build, explain, message):
    text = re.sub(r"\s+", " ", PAGE.read_text())
    assert message in text
    model = build().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if "unrecognized" in message else "ignore")
        with pytest.raises(Exception, match=re.escape(message)):
            explain(model)


@pytest.mark.parametrize("build", [case[0] for case in CASES.values()], ids=CASES)
def test_the_model_adds_up_with_fxshap(build):
    model = build().eval()
    assert_exact(model, fxshap.make_explainable(model), [BACKGROUND], [SAMPLES], 1e-5)
