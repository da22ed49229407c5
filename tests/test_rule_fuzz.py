"""Every rule from denormal numbers to 1e30, and what that has found.

``python -m tests.fuzzing rules`` draws 100,000 times a rule; here a few hundred rows each.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxshap.rules.operation import Operation
from tests.fuzzing.extremes import draw_values
from tests.rule_cases import TOLERANCE, multiply

aten = torch.ops.aten
FLOATS = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def both_ends(
    shape: tuple[int, ...], dtype: torch.dtype, high: float = 30
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    r, x = (draw_values(shape, (-40, 30), dtype, generator) for _ in range(2))
    near = torch.rand(shape, generator=generator) < 0.3
    return r, torch.where(near, r * 1.001, x)


def slack(dtype: torch.dtype) -> float:
    """What a quotient of differences loses where the ends differ by a thousandth."""
    return 16 * torch.finfo(dtype).eps / 1e-3


def operation_of(name: str, shape: tuple[int, ...] = (1,), args: Any = None) -> Operation:
    """Bind an operator of one varying argument and constants."""
    constants = {"clamp": (-1.0, 0.5), "softshrink": (0.5,)}.get(name, ()) if args is None else args
    target, _, overload = name.partition(".")
    operator = getattr(getattr(aten, target), overload or "default")
    operation, _ = Operation.bind(operator, (torch.zeros(shape), *constants), slots=(0,))
    return operation


# --- what the draws have found --------------------------------------------------------------------


def secant(name: str, r: float, x: float, dtype: torch.dtype, *args: Any) -> tuple[float, float]:
    """The multiplier between two numbers, and the change of the output that it gives."""
    ends = [torch.tensor([value], dtype=dtype) for value in (r, x)]
    (m,) = multiply(operation_of(name, args=args), ends[:1], ends[1:], torch.ones(1, dtype=dtype))
    return m.item(), m.item() * (ends[1].double() - ends[0].double()).item()


@FLOATS
@pytest.mark.parametrize("far", [700.0, 7782.53125, 1e5, 2.7695840936682888e10, 1e30])
@pytest.mark.parametrize("name", ["gelu", "erf", "erfc", "special_ndtr"])
def test_far_tails_of_the_normal_distribution_are_finite(name, far, dtype):
    """What made good for the rounding of z^2 overflowed: 0 * inf."""
    for r, x in ((far, far), (-far, -far), (-far, far), (far, far * (1 + 1e-6)), (0.0, -far)):
        m, _ = secant(name, r, x, dtype)
        assert math.isfinite(m)
    assert secant("gelu", far, 2 * far, dtype)[0] == pytest.approx(1, rel=1e-6)


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
        ends = [torch.tensor([value], dtype=dtype) for value in (r, x)]
        operation, _ = Operation.bind(aten.gelu.default, (ends[0],), {"approximate": "tanh"})
        (m,) = multiply(operation, ends[:1], ends[1:], torch.ones(1, dtype=dtype))
        assert m.item() == pytest.approx(slope, abs=1e-6)


@FLOATS
@pytest.mark.parametrize("name", ["silu", "mish"])
@pytest.mark.parametrize("x", [-50.0, -907405033298.1686, -1.4678160959147837e26])
def test_silu_and_mish_owe_nothing_far_below_0(name, x, dtype):
    """mean(s) + mean(x) ds/dx cancelled, to rounding errors of the size of x."""
    _, change = secant(name, 0.0, x, dtype)
    assert abs(change) < 1e-6 if x < -50 else abs(change) < 1e-18
