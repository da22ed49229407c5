"""Every rule between random endpoints, from denormal numbers to 1e30.

``python -m tests.property rules`` draws 100,000 rows for each case; these tests draw a few hundred.
Failures that it found are tests of the family, in ``tests/rules``.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import Case
from tests.property.extremes import DRAWN, check_draws, draw_values, max_rows
from tests.rules.helpers import FLOATS, bind_unary

aten = torch.ops.aten


@FLOATS
@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_rules_add_up_at_every_size(case: Case, dtype: torch.dtype) -> None:
    """Multipliers are finite and add up in every row that is not excused; most are not excused."""
    rows, excused = 0, 0
    for seed in range(6 if case.output_row is None else 1):
        result = check_draws(case, dtype, max_rows(case, 200), seed)
        assert not result.failure
        rows, excused = rows + result.rows, excused + result.excused
    assert excused < 0.9 * rows


# --- bounded multipliers ------------------------------------------------------------------------

#: The smallest and the largest derivative.
SLOPES: dict[str, tuple[float, float]] = {
    "relu": (0, 1),
    "relu6": (0, 1),
    "hardtanh": (0, 1),
    "clamp": (0, 1),
    "hardsigmoid": (0, 0.1666666717),  # torch's own derivative is 1/6 in float32
    "hardswish": (-0.5, 1.5),
    "softshrink": (0, 1),
    "leaky_relu": (0.01, 1),
    "abs": (-1, 1),
    "sigmoid": (0, 0.25),
    "tanh": (0, 1),
    "softplus": (0, 1),
    "log_sigmoid": (0, 1),
    "elu": (0, 1),
    "selu": (0, 1.7580993408473766),
    "silu": (-0.1, 1.1),
    "mish": (-0.12, 1.09),
    "gelu": (-0.13, 1.13),
    "erf": (0, 2 / math.sqrt(math.pi)),
    "special_ndtr": (0, 1 / math.sqrt(2 * math.pi)),
    "sin": (-1, 1),
    "cos": (-1, 1),
    "atan": (0, 1),
    "asinh": (0, 1),
}


def draw_both(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw references and samples, in some places close together."""
    generator = torch.Generator().manual_seed(0)
    r, x = (draw_values(shape, (-40, 30), dtype, generator) for _ in range(2))
    near = torch.rand(shape, generator=generator) < 0.3
    return r, torch.where(near, r * 1.001, x)


def slack(dtype: torch.dtype) -> float:
    """Return the error of a quotient of differences whose endpoints differ by a thousandth."""
    return 16 * torch.finfo(dtype).eps / 1e-3


@FLOATS
@pytest.mark.parametrize("name", SLOPES)
def test_secants_stay_within_the_derivatives_of_the_function(name: str, dtype: torch.dtype) -> None:
    operation, low, high = bind_unary(name), *SLOPES[name]
    r, x = draw_both((4000,), dtype)
    (m,) = apply_rule(operation, [r], [x], torch.ones_like(r))
    assert m.min() >= low - slack(dtype)
    assert m.max() <= high + slack(dtype)


@FLOATS
@pytest.mark.parametrize(
    "name, args",
    [
        ("amax", ([-1],)), ("amin", ([-1],)), ("max.dim", (-1,)), ("maximum", None),
        ("max_pool1d", ([5],)), ("adaptive_max_pool1d", ([1],)), ("logsumexp", ([-1],)),
    ],
)  # fmt: skip
def test_multipliers_of_a_maximum_lie_between_0_and_1(
    name: str, args: Any, dtype: torch.dtype
) -> None:
    r, x = draw_both((500, 1, 5), dtype)
    if name == "maximum":
        operation, _ = Operation.bind(aten.maximum.default, (r, x), slots=(0, 1))
        endpoints = [r, x], [x.flip(0), r.flip(1)]
    else:
        operation, endpoints = bind_unary(name, args=args), ([r], [x])
    y = operation(*endpoints[0])
    ones = (torch.ones_like(y[0]), None) if isinstance(y, tuple) else torch.ones_like(y)
    for m in apply_rule(operation, *endpoints, ones):
        assert m.min() >= -slack(dtype)
        assert m.max() <= 1 + slack(dtype)


@FLOATS
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e10, 1e30])
def test_multipliers_of_softmax_are_bounded(scale: float, dtype: torch.dtype) -> None:
    """A change of one logit by d changes no output by more than d / 4, as for a logistic function.

    A multiplier is a mean of such slopes times the cotangents, here at most 1, and their sum.
    """
    generator = torch.Generator().manual_seed(0)
    r, x, g = torch.randn(3, 500, 6, generator=generator, dtype=torch.float64).to(dtype)
    (m,) = apply_rule(bind_unary("softmax.int", args=(-1,)), [scale * r], [scale * x], g.sign())
    assert m.abs().max() <= 2
