"""The precision of GELU's multiplier, and of every way to write GELU."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxshap
from tests.rules.gelu_reference import FORMS, grid, reference, slopes

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=str)
def test_multiplier_is_precise_for_any_two_ends(
    form: str, dtype: torch.dtype, bound: float
) -> None:
    """For x from -40 to 40 and |d| from 1e-12 to 1e2, both signs, and d = 0.

    The multiplier is m = mean(P) + mean(x) dP/d, a sum of two terms that cancel on a curve through
    (x, d) = (-0.7518, 0), where m is 0. The error of m is relative to the magnitude of the terms,
    |mean(P)| + |mean(x) dP/d|, which in the tails is that of m itself. A magnitude that is
    subnormal in the dtype has no full precision: there the error is below the smallest normal
    number times the bound and the factor |x / d| that it has been multiplied by.
    """
    r, x = grid(dtype, points=161)
    true, magnitude = reference(form, r, x)
    smallest = torch.finfo(dtype).tiny
    amplified = ((x.abs() + r.abs()) / (x - r).abs().clamp(min=0.1)).clamp(min=1).double()
    error = (slopes(form, r, x).double() - true).abs()
    assert (error <= bound * (magnitude + smallest * amplified)).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), DTYPES, ids=str)
def test_plain_relative_error_away_from_the_zero_of_the_multiplier(
    form: str, dtype: torch.dtype, bound: float
) -> None:
    """Relative to |m| alone, wherever that is at least a tenth of the magnitude of its terms."""
    r, x = grid(dtype, points=161)
    true, magnitude = reference(form, r, x)
    counted = (true.abs() > magnitude / 10) & (true.abs() > 1e3 * torch.finfo(dtype).tiny)
    error = (slopes(form, r, x).double() / true - 1).abs()
    assert counted.double().mean() > 0.7
    assert error[counted].max() <= bound


# --- every spelling -----------------------------------------------------------------------------


def by_hand_erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def by_hand_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def by_hand_sigmoid(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


SPELLINGS = {
    "module": nn.GELU(),
    "module, tanh": nn.GELU(approximate="tanh"),
    "function": F.gelu,
    "function, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "by hand, erf": by_hand_erf,
    "by hand, tanh": by_hand_tanh,
    "by hand, sigmoid": by_hand_sigmoid,
}


class Pointwise(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def multiplier(spelling: str, r: Tensor, x: Tensor) -> Tensor:
    """Read the multiplier of a pointwise network as SHAP does: the gradient of a paired call."""
    explainable = fxshap.make_explainable(Pointwise(SPELLINGS[spelling]))
    joint = torch.cat([x, r]).requires_grad_()
    with fxshap.multiplier_mode():
        (grad,) = torch.autograd.grad(explainable(joint).sum(), joint)
    return grad[len(x) :]


R = torch.linspace(-6, 6, 60, dtype=torch.float64).repeat(9)[:, None]
X = R + torch.logspace(-6, 2, 9, dtype=torch.float64).repeat_interleave(60)[:, None]


def exact_sigmoid(z: mpmath.mpf) -> mpmath.mpf:
    return z / (1 + mpmath.exp(-mpmath.mpf(1.702) * z))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_has_the_secant_of_its_own_function(spelling: str) -> None:
    form = "tanh" if "tanh" in spelling else "erf"
    if "sigmoid" in spelling:
        with mpmath.workdps(60):
            pairs = zip(R.flatten().tolist(), X.flatten().tolist(), strict=True)
            endpoints = [(mpmath.mpf(a), mpmath.mpf(b)) for a, b in pairs]
            exact = [float((exact_sigmoid(b) - exact_sigmoid(a)) / (b - a)) for a, b in endpoints]
        true = torch.tensor(exact, dtype=torch.float64)[:, None]
    else:
        true, _ = reference(form, R, X)
    torch.testing.assert_close(multiplier(spelling, R, X), true, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spelling", ["function", "by hand, erf"])
def test_gelu_by_hand_is_the_module(spelling: str) -> None:
    difference = multiplier(spelling, R, X) - multiplier("module", R, X)
    assert difference.abs().max() <= 1e-12
