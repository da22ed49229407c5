"""Float32 inside a float64 model is computed in float64, unless float32 is intended."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxshap
from tests.helpers import Between, assert_exact, explain, sine_for

WEIGHTS = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def data(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 4, generator=generator, dtype=torch.float64).to(dtype)


def rms_norm(h: Tensor, dtype: torch.dtype) -> Tensor:
    cast = h.to(dtype)
    return h * (cast * cast.pow(2).mean(-1, keepdim=True).add(1e-3).rsqrt()).to(h.dtype)


def softmax(h: Tensor, dtype: torch.dtype) -> Tensor:
    return (3 * h).softmax(-1, dtype=dtype).to(h.dtype)


def attention(h: Tensor, dtype: torch.dtype) -> Tensor:
    q, k, v = (part.unsqueeze(-1).to(dtype) for part in (h, h.sin(), h.cos()))
    return (q @ (k.mT @ v) / (q**2 @ k.sum(-2, keepdim=True) ** 2 + 1)).squeeze(-1).type_as(h)


def rounded_weights(h: Tensor, dtype: torch.dtype) -> Tensor:
    return (h.to(dtype) @ WEIGHTS.float().to(dtype)).tanh().to(h.dtype)


def numbers_of_its_own(h: Tensor, dtype: torch.dtype) -> Tensor:
    steps, none = torch.arange(1, 7, dtype=dtype) / 8, torch.zeros_like(h, dtype=dtype)
    return torch.cat([none, (h.to(dtype) * steps).sin()], -1)[:, 6:].to(h.dtype)


def mask(h: Tensor, dtype: torch.dtype) -> Tensor:
    return ((h > 0).to(dtype) @ torch.ones(6, 6, dtype=dtype) * h.to(dtype)).sin().to(h.dtype)


def frequencies(h: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(h.to(dtype)).abs() ** 2, n=6).to(h.dtype)


def order(h: Tensor, dtype: torch.dtype) -> Tensor:
    return (h.argsort(-1) / 4).to(dtype) * h


PARTS: list[Callable[[Tensor, torch.dtype], Tensor]] = [
    rms_norm,
    softmax,
    attention,
    rounded_weights,
    numbers_of_its_own,
    mask,
    frequencies,
    order,
]


def between(part: Callable[[Tensor, torch.dtype], Tensor], dtype: torch.dtype) -> nn.Module:
    """A model in float64 with a part in another type."""
    return Between(lambda h: part(h, dtype)).double()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_the_part_is_explained_as_in_float64(part: Callable[..., Tensor]) -> None:
    single, double = (between(part, dtype) for dtype in (torch.float32, torch.float64))
    explainable = fxshap.make_explainable(single)
    values = assert_exact(single, explainable, [data(5)], [data(3)], 1e-6)
    expected = assert_exact(double, fxshap.make_explainable(double), [data(5)], [data(3)], 1e-12)
    # Of the order of 1, and rounded in another order.
    np.testing.assert_allclose(values[0], expected[0], rtol=0, atol=1e-13)
    assert explainable.compute_dtype == torch.float32


def tree(x: Tensor) -> Tensor:
    return (x.float() >= 0.7).to(x.dtype)


def bins(x: Tensor) -> Tensor:
    return (x.float() * 100).floor().to(x.dtype) / 100


def ranks(x: Tensor) -> Tensor:
    return x.float().sort(-1).indices.to(x.dtype)


def later(x: Tensor) -> Tensor:
    return (100 * x.float().to(x.dtype)).floor() / 100


@pytest.mark.parametrize("decide", [tree, bins, ranks, later], ids=lambda f: f.__name__)
def test_decisions_come_out_as_in_the_model(decide: Callable[[Tensor], Tensor]) -> None:
    out = nn.Linear(4, 2).double()
    model = Around(lambda x: out(decide(x)))
    background = torch.tensor([[0.2, 0.3, 0.4, 0.5], [0.1, 0.9, 0.0, 0.3]], dtype=torch.float64)
    samples = torch.tensor([[0.29, 0.58, 0.57, 0.7], [0.1, 0.7, 0.29, 0.56]], dtype=torch.float64)
    background, samples = background.float().double(), samples.float().double()
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, [background], [samples], 1e-6)
    with torch.no_grad(), fxshap.multiplier_mode():
        paired = explainable(torch.cat([samples, background]))
    assert torch.equal(paired, model(torch.cat([samples, background])))


def test_what_is_bound_keeps_its_type() -> None:
    out = nn.Linear(4, 2).double()
    model = Around(lambda h, p: out((h.float().tanh() * (p >= 0.7)).to(h.dtype)))
    explainable = fxshap.make_explainable(model).bind(p=torch.full((1, 4), 0.7))
    plain = Around(lambda h: model(h, torch.full((1, 4), 0.7)))
    assert_exact(plain, explainable, [data(5)], [data(3)], 1e-6)


class Around(nn.Module):
    """A function of the input."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor, p: Tensor | None = None) -> Tensor:
        return self.function(h) if p is None else self.function(h, p)


def test_a_constant_is_cast_once() -> None:
    table = torch.randn(6, 6)

    def twice(h: Tensor) -> Tensor:
        return ((h.float() @ table).tanh() @ table).to(h.dtype)

    explainable = fxshap.make_explainable(Between(twice).double())
    explain(explainable, [data(5)], [data(3)])
    assert len(explainable._calls.captures.latest.program.rewritten.folded) == 1


@pytest.mark.parametrize("part", [lambda h: h.float().double(), lambda h: h * h.float()])
def test_verify_sees_what_only_rounds(part: Callable[[Tensor], Tensor]) -> None:
    result = fxshap.verify(Between(part).double(), data(5), data(3))
    assert result.compute_dtype == torch.float32 and result.additive


def test_a_float32_mask_is_not_low_precision() -> None:
    model = Between(lambda h: (h > 0).float() * h).double()
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, [data(5)], [data(3)], 1e-12)
    assert explainable.compute_dtype == torch.float64


def test_an_output_keeps_its_type() -> None:
    model = nn.Sequential(Between(torch.tanh).double(), Cast(torch.float32)).eval()
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, [data(5)], [data(3)], 1e-6)
    with fxshap.multiplier_mode():
        assert explainable(torch.cat([data(3), data(3)])).dtype == torch.float32


class Cast(nn.Module):
    """Cast to a type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def assert_untouched(model: nn.Module, inside: torch.dtype) -> None:
    """Check that what SHAP sees of a float64 input is, bit for bit, what the model gives."""
    explainable = fxshap.make_explainable(model)
    explain(explainable, [data(5)], [data(3)], check_additivity=False)
    with torch.no_grad(), fxshap.multiplier_mode():
        paired = explainable(torch.cat([data(3), data(3)]))
    with torch.no_grad():
        assert torch.equal(paired[:3], model(data(3)))
    assert explainable.compute_dtype == inside


def test_a_model_with_weights_of_float32_is_not_touched() -> None:
    body = Between(torch.tanh)
    assert_untouched(nn.Sequential(Cast(torch.float32), body, Cast(torch.float64)), torch.float32)


def test_half_precision_on_purpose_is_not_touched() -> None:
    model = Between(lambda h: (h.half().float().tanh() * h.float()).double()).double()
    assert_untouched(model, torch.float16)


single_sine = sine_for("single_sine", torch.float32)


def test_operators_of_ones_own_keep_their_type() -> None:
    model = Between(lambda h: single_sine(h.float()).double()).double()
    assert_untouched(model, torch.float32)


def test_verify_reports_the_precision_inside() -> None:
    result = fxshap.verify(between(attention, torch.float32), data(5), data(3))
    assert (result.dtype, result.compute_dtype) == (torch.float64, torch.float32)
    assert result.additive and result.additivity_error > 1e-9 and not result.leaks
    assert "float64, float32 inside" in str(result)
    assert result.to_dict()["compute_dtype"] == "float32"
    plain = fxshap.verify(between(attention, torch.float64), data(5), data(3))
    assert plain.compute_dtype == torch.float64 and "inside" not in str(plain)


def test_verify_reports_autocast() -> None:
    class Autocast(Between):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    result = fxshap.verify(Autocast(torch.tanh), data(5).float(), data(3).float())
    assert result.compute_dtype == torch.bfloat16
    assert result.additive and result.additivity_error > 1e-4
