"""Secants of univariate functions: divided differences, finite far from 0 and at kinks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch

from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import TOLERANCE
from tests.rules.helpers import FLOATS, bind_unary, multipliers

aten = torch.ops.aten


def log1p_exp(z: Any) -> Any:
    return mpmath.log1p(mpmath.exp(z))


def sigmoid(z: Any) -> Any:
    return 1 / (1 + mpmath.exp(-z))


#: Operator, constants, exact function, range of r.
SMOOTH: dict[str, tuple[Any, tuple[Any, ...], Callable[[Any], Any], tuple[float, float]]] = {
    "exp": (aten.exp.default, (), mpmath.exp, (-20, 20)),
    "expm1": (aten.expm1.default, (), mpmath.expm1, (-20, 20)),
    "exp2": (aten.exp2.default, (), lambda z: mpmath.mpf(2) ** z, (-20, 20)),
    "log": (aten.log.default, (), mpmath.log, (0.01, 20)),
    "log2": (aten.log2.default, (), lambda z: mpmath.log(z, 2), (0.01, 20)),
    "log1p": (aten.log1p.default, (), mpmath.log1p, (-0.9, 20)),
    "sigmoid": (aten.sigmoid.default, (), sigmoid, (-30, 30)),
    "tanh": (aten.tanh.default, (), mpmath.tanh, (-15, 15)),
    "softplus": (aten.softplus.default, (), log1p_exp, (-30, 19)),
    "log_sigmoid": (aten.log_sigmoid.default, (), lambda z: -log1p_exp(-z), (-19, 30)),
    "silu": (aten.silu.default, (), lambda z: z * sigmoid(z), (-20, 20)),
    "mish": (aten.mish.default, (), lambda z: z * mpmath.tanh(log1p_exp(z)), (-20, 18)),
    "elu": (aten.elu.default, (), lambda z: z if z > 0 else mpmath.expm1(z), (-20, 20)),
    "sqrt": (aten.sqrt.default, (), mpmath.sqrt, (0.01, 20)),
    "rsqrt": (aten.rsqrt.default, (), lambda z: 1 / mpmath.sqrt(z), (0.01, 20)),
    "reciprocal": (aten.reciprocal.default, (), lambda z: 1 / z, (0.01, 20)),
    "square": (aten.square.default, (), lambda z: z * z, (-20, 20)),
    "pow 3": (aten.pow.Tensor_Scalar, (3,), lambda z: z**3, (-20, 20)),
    "pow -2": (aten.pow.Tensor_Scalar, (-2,), lambda z: z**-2, (0.01, 20)),
    "pow 1.5": (aten.pow.Tensor_Scalar, (1.5,), lambda z: z ** mpmath.mpf(1.5), (0.01, 20)),
    "sin": (aten.sin.default, (), mpmath.sin, (-7, 7)),
    "cos": (aten.cos.default, (), mpmath.cos, (-7, 7)),
    "erf": (aten.erf.default, (), mpmath.erf, (-4, 4)),
    "ndtr": (aten.special_ndtr.default, (), mpmath.ncdf, (-20, 4)),
    "atan": (aten.atan.default, (), mpmath.atan, (-20, 20)),
    "asinh": (aten.asinh.default, (), mpmath.asinh, (-20, 20)),
    "sinh": (aten.sinh.default, (), mpmath.sinh, (-20, 20)),
    "tan": (aten.tan.default, (), mpmath.tan, (-1.4, 1.4)),
}

#: Functions without a closed form: a quadrature of the derivative where the quotient is worse.
BY_QUADRATURE = ("pow 1.5", "atan", "asinh", "sinh", "tan")
#: Functions whose secants pass through 0, where no relative error is small.
CROSSING = ("sin", "cos", "silu", "mish")


@pytest.mark.parametrize("name", SMOOTH)
def test_secants_are_divided_differences(name: str) -> None:
    """Float64 against 60 digits, for d = 0 and d from 1e-12 to 0.3, relative to the secant."""
    target, constants, exact, (low, high) = SMOOTH[name]
    r = torch.linspace(low, high, 37, dtype=torch.float64)[:, None] + 0.0123
    x = r + torch.cat([torch.zeros(1), torch.logspace(-12, -0.5, 24, dtype=torch.float64)])
    r = r.expand_as(x)
    (found,) = multipliers(target, (r,), (x,), *constants)
    with mpmath.workdps(60):
        true = torch.tensor(
            [
                float(exact_secant(exact, mpmath.mpf(a), mpmath.mpf(b)))
                for a, b in zip(r.flatten().tolist(), x.flatten().tolist(), strict=True)
            ],
            dtype=torch.float64,
        ).reshape(x.shape)
    counted = true.abs() > (0.02 if name in CROSSING else 0)
    error = (found / true - 1).abs()[counted]
    assert error.max() <= (1e-11 if name in BY_QUADRATURE else 5e-14)


def exact_secant(exact: Callable[[Any], Any], a: Any, b: Any) -> Any:
    """Return the divided difference, across a step of 1e-25 where the endpoints are equal."""
    if a == b:
        a, b = a - mpmath.mpf("5e-26"), a + mpmath.mpf("5e-26")
    return (exact(b) - exact(a)) / (b - a)


TINY = torch.logspace(-12, -1, 12, dtype=torch.float64)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardswish", "hardsigmoid", "elu", "abs"])
@pytest.mark.parametrize("side", [-1, 1])
def test_the_secant_from_a_kink_is_the_slope_of_that_side(name: str, side: int) -> None:
    target = getattr(aten, name).default
    kinks = torch.tensor([[-3.0], [0.0], [3.0]] if name.startswith("hard") else [[0.0]])
    kink = kinks.double().expand(-1, 12)
    other = kink + side * TINY
    for r, x in ((kink, other), (other, kink)):
        (slope,) = multipliers(target, (r,), (x,))
        change = target(x) - target(r)
        torch.testing.assert_close(slope * (x - r), change, rtol=1e-12, atol=1e-15)


def test_prelu_has_a_secant_for_each_channel() -> None:
    weight = torch.tensor([0.1, -0.5, 2.0], dtype=torch.float64)
    r = torch.full((12, 3), -0.7, dtype=torch.float64)
    (slope,) = multipliers(aten.prelu.default, (r,), (r + TINY[:, None],), weight)
    torch.testing.assert_close(slope, weight.expand(12, 3), rtol=1e-15, atol=0)


def test_relu_multipliers_lie_between_0_and_1() -> None:
    r, x = torch.randn(2, 10000)
    (slope,) = multipliers(aten.relu.default, (r,), (x,))
    assert slope.min() >= 0
    assert slope.max() <= 1


def test_square_root_at_0_has_a_finite_multiplier() -> None:
    zero = torch.zeros(3)
    assert multipliers(aten.sqrt.default, (zero,), (zero,))[0].eq(0).all()
    for target in (aten.std.correction, aten.linalg_vector_norm.default):
        assert multipliers(target, (zero,), (zero,))[0].eq(0).all()


def multiplier_and_change(
    name: str, r: float, x: float, dtype: torch.dtype, *args: Any
) -> tuple[float, float]:
    """Return the multiplier between two numbers, and the change of the output that it gives."""
    endpoints = [torch.tensor([value], dtype=dtype) for value in (r, x)]
    (m,) = apply_rule(
        bind_unary(name, args=args), endpoints[:1], endpoints[1:], torch.ones(1, dtype=dtype)
    )
    return m.item(), m.item() * (endpoints[1].double() - endpoints[0].double()).item()


@FLOATS
@pytest.mark.parametrize("far", [700.0, 7782.53125, 1e5, 2.7695840936682888e10, 1e30])
@pytest.mark.parametrize("name", ["gelu", "erf", "erfc", "special_ndtr"])
def test_far_tails_of_the_normal_distribution_are_finite(name, far, dtype):
    """The correction of the rounding error of z^2 overflowed to 0 * inf."""
    for r, x in ((far, far), (-far, -far), (-far, far), (far, far * (1 + 1e-6)), (0.0, -far)):
        m, _ = multiplier_and_change(name, r, x, dtype)
        assert math.isfinite(m)
    assert multiplier_and_change("gelu", far, 2 * far, dtype)[0] == pytest.approx(1, rel=1e-6)


@FLOATS
@pytest.mark.parametrize("far", [90.0, 8390.605691451925, 1e6, 1e19, 1e30])
def test_far_tails_of_gelus_tanh_form_are_finite(far, dtype):
    for r, x, slope in (
        (0.0, far, 1),
        (far, far, 1),
        (-far, -far, 0),
        (-far, 0.0, 0),
        (-far, far, 0.5),
    ):
        endpoints = [torch.tensor([value], dtype=dtype) for value in (r, x)]
        operation, _ = Operation.bind(aten.gelu.default, (endpoints[0],), {"approximate": "tanh"})
        (m,) = apply_rule(operation, endpoints[:1], endpoints[1:], torch.ones(1, dtype=dtype))
        assert m.item() == pytest.approx(slope, abs=1e-6)


@FLOATS
@pytest.mark.parametrize("name", ["silu", "mish"])
@pytest.mark.parametrize("x", [-50.0, -907405033298.1686, -1.4678160959147837e26])
def test_silu_and_mish_do_not_change_far_below_0(name, x, dtype):
    """The terms of mean(s) + mean(x) ds/dx cancelled, and left rounding errors of the size of x."""
    _, change = multiplier_and_change(name, 0.0, x, dtype)
    assert abs(change) < 1e-6 if x < -50 else abs(change) < 1e-18


@FLOATS
@pytest.mark.parametrize(
    "r, x", [(1e4, 1.1e4), (-29668.155684547422, 29668.155684547422), (1e19, 0)]
)
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sine_and_cosine_of_large_arguments_add_up(name, r, x, dtype):
    """The midpoint's rounding error, times d, is larger than that of the quotient."""
    endpoints = [torch.tensor([value], dtype=dtype) for value in (r, x)]
    exact = getattr(torch, name)(endpoints[1].double()) - getattr(torch, name)(
        endpoints[0].double()
    )
    _, change = multiplier_and_change(name, r, x, dtype)
    assert change == pytest.approx(exact.item(), abs=TOLERANCE[dtype])
