"""Half precision and autocast: additive to 20 units in the last place of the output."""

from __future__ import annotations

import pytest
import shap
import torch
from torch import Tensor, nn

import fxshap
from benchmarks.models import NETWORKS
from benchmarks.narrow import DTYPES, LIMIT, WAYS, build, error
from fxshap.errors import InputError

#: One of each kind; `make narrow` takes all.
SOME = (
    "gelu_module",
    "batch_norm",
    "layer_norm",
    "softmax_inside",
    "max_pool2d_overlapping",
    "computed_convolution_einsum",
    "scaled_dot_product_attention",
)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("way", WAYS)
def test_it_adds_up(name: str, way: str, dtype: torch.dtype) -> None:
    model = build(name, way, dtype)
    assert model is not None
    assert error(model, NETWORKS[name], dtype) <= LIMIT


class Masked(nn.Module):
    """Attention weights with a mask that depends on the input, as float16 must hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.softmax(x.masked_fill(x < 0, -torch.inf), -1) * x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_computed_mask_stays_finite(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Masked().to(dtype).eval()
    background, samples = torch.randn(5, 4).to(dtype), torch.randn(3, 4).to(dtype)
    background[:, 0], samples[:, 1] = background[:, 0].abs(), samples[:, 1].abs()
    values = shap.DeepExplainer(fxshap.make_explainable(model), background).shap_values(
        samples, check_additivity=False
    )
    with torch.no_grad():
        change = model(samples).float() - model(background).float().mean(0)
    worst = (torch.from_numpy(values).float().sum(1) - change).abs().max()
    assert worst <= LIMIT * torch.finfo(dtype).eps


@pytest.mark.parametrize("wide", [False, True], ids=["inputs too", "output"])
def test_shap_has_no_bfloat16(wide: bool) -> None:
    model = nn.Linear(4, 2).to(torch.bfloat16)
    explainable = fxshap.make_explainable(model, output=(lambda y: y.float()) if wide else None)
    with pytest.raises(InputError, match=r"NumPy has no bfloat16.*bfloat16\(\)\)\.float\(\)"):
        shap.DeepExplainer(explainable, torch.randn(3, 4).to(torch.bfloat16))


def test_inputs_of_another_type_are_refused_where_the_model_fails() -> None:
    explainable = fxshap.make_explainable(nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"float64 but the model's weights of torch\.float32"):
        shap.DeepExplainer(explainable, torch.randn(3, 4).double())
    with pytest.raises(InputError, match=r"cast samples and background"):
        explainable.prepare(torch.randn(3, 4).double())
