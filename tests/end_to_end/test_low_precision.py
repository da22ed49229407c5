"""Half precision and autocast: additive to 20 units in the last place of the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shap
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap.errors import InputError
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.verification.metrics import additivity_error
from fxshap.verification.verify import shap_values
from tests.helpers import Between, sine_for
from tests.networks import NETWORKS
from tests.networks.low_precision import (
    DTYPES,
    LIMIT,
    VARIANTS,
    HalfPrecision,
    build,
    error_in_units,
)

#: One of each kind; `make low-precision` takes all.
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
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_adds_up(name: str, variant: str, dtype: torch.dtype) -> None:
    model = build(name, variant, dtype)
    assert model is not None
    assert error_in_units(model, NETWORKS[name], dtype) <= LIMIT


def test_a_capture_in_autocast_leaves_the_weights_of_recurrent_layers() -> None:
    name = "gru_stacked_bidirectional_projected"
    model = build(name, "autocast", torch.bfloat16)
    assert model is not None
    layers = [module for module in model.modules() if isinstance(module, nn.GRU)]
    before = [weight for layer in layers for weight in layer._flat_weights]
    assert error_in_units(model, NETWORKS[name], torch.bfloat16) <= LIMIT
    after = [weight for layer in layers for weight in layer._flat_weights]
    assert all(a is b for a, b in zip(before, after, strict=True))


#: Functions of six numbers whose squares, or sums of them, are more than float16 holds.
LARGE = {
    "layer_norm": lambda h: F.layer_norm(2000 * h, (6,)),
    "rms_norm": lambda h: F.rms_norm(2000 * h, (6,)),
    "norm": lambda h: 2000 * h / torch.linalg.vector_norm(2000 * h, dim=-1, keepdim=True),
    "standard deviation": lambda h: (500 * h).std(-1, keepdim=True) * h / 500,
    "gelu": lambda h: F.gelu(500 * h) / 500,
    "softmax": lambda h: (20 * h).softmax(-1),
}


@pytest.mark.parametrize("options", [{}, {"refine": 1}, {"rule": "variance"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", LARGE)
def test_rules_compute_in_float32(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = HalfPrecision(Between(LARGE[name]), dtype).eval()
    background, samples = torch.randn(6, 4), torch.randn(3, 4)
    explainable = fxshap.make_explainable(model, **options)
    values, _ = shap_values(explainable, [background], [samples], None)
    found = additivity_error(model, [background], [samples], values)
    assert found <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
def test_multipliers_of_low_precision_endpoints_are_those_in_float32(
    dtype: torch.dtype,
) -> None:
    weights = torch.randn(3, 16).to(dtype)
    *endpoints, grad = [torch.randn(5, 16).to(dtype) for _ in range(3)]
    operation, _ = Operation.bind(
        torch.ops.aten.layer_norm.default, (endpoints[0], [16], weights[0], weights[1])
    )
    found = apply_rule(operation, endpoints[:1], endpoints[1:], grad)
    operation, _ = Operation.bind(
        torch.ops.aten.layer_norm.default,
        (endpoints[0], [16], weights[0].float(), weights[1].float()),
    )
    r, x, grad = (tensor.float() for tensor in (*endpoints, grad))
    assert torch.equal(found[0], apply_rule(operation, [r], [x], grad)[0].to(dtype))


half_sine = sine_for("half_sine", *DTYPES)


def chosen(h: Tensor) -> Tensor:
    return F.one_hot(h.argmax(-1), 6).to(h.dtype) * h


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("function", [half_sine, chosen], ids=["a user's operator", "a choice"])
def test_functions_in_a_low_precision_type_only(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    model = HalfPrecision(Between(function), dtype).eval()
    background, samples = torch.randn(6, 4), torch.randn(3, 4)
    values, _ = shap_values(fxshap.make_explainable(model), [background], [samples], None)
    found = additivity_error(model, [background], [samples], values)
    assert found <= LIMIT * torch.finfo(dtype).eps


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
    with pytest.raises(InputError, match=r"float64, but the model's weights torch\.float32"):
        shap.DeepExplainer(explainable, torch.randn(3, 4).double())
    with pytest.raises(InputError, match=r"convert samples and background"):
        explainable.capture(torch.randn(3, 4).double())
