"""What tests of single rules share: bound operations, multipliers, attributions and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import TOLERANCE
from fxshap.verification.shapley import shapley_values

aten = torch.ops.aten

#: Both types in which rules compute, with their tolerance.
FLOATS = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def multipliers(target: Any, r: tuple[Tensor, ...], x: tuple[Tensor, ...], *constants: Any) -> Any:
    """Return the multipliers of the sum of all outputs."""
    operation, _ = Operation.bind(target, (*r, *constants), slots=range(len(r)))
    return apply_rule(operation, r, x, torch.ones_like(operation(*r)))


def bind_unary(name: str, shape: tuple[int, ...] = (1,), args: Any = None) -> Operation:
    """Bind an operator, named "softmax.int", say, with one varying argument and constants."""
    constants = {"clamp": (-1.0, 0.5), "softshrink": (0.5,)}.get(name, ()) if args is None else args
    target, _, overload = name.partition(".")
    operator = getattr(getattr(aten, target), overload or "default")
    operation, _ = Operation.bind(operator, (torch.zeros(shape), *constants), slots=(0,))
    return operation


def row_error(name: str, r: Tensor, x: Tensor, *args: Any) -> float:
    """Return the additivity error of the rows of an operation, for a random cotangent."""
    operation = bind_unary(name, args=args)
    y_r, y_x = operation(r), operation(x)
    g = torch.randn(r.shape, generator=torch.Generator().manual_seed(0)).to(r.dtype)
    (m,) = apply_rule(operation, [r], [x], g)
    given, change = (
        (m.double() * (x.double() - r.double())).sum(-1),
        (g * (y_x - y_r)).double().sum(-1),
    )
    return float((given - change).abs().max() / g.abs().sum(-1).max())


def endpoints(*pairs: tuple[float, float]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the references and the samples of several numbers, in float64."""
    at = [[torch.tensor([end[k]], dtype=torch.float64) for end in pairs] for k in (0, 1)]
    return at[0], at[1]


def attributions_and_change(
    target: Any, r: list[Tensor], x: list[Tensor]
) -> tuple[list[float], float]:
    """Return the attribution of every argument, and the change of the output."""
    operation, _ = Operation.bind(target, r, slots=tuple(range(len(r))))
    found = apply_rule(operation, r, x, torch.ones_like(r[0]))
    attributions = [(m * (b - a)).item() for m, a, b in zip(found, r, x, strict=True)]
    return attributions, (operation(*x) - operation(*r)).item()


def total_error(target: Any, r: list[Tensor], x: list[Tensor], grad: Tensor, *others: Any) -> float:
    """Return the relative error of the total; infinite if a multiplier is not finite."""
    rows = [None] * (len(r) + 1)
    operation, _ = Operation.bind(target, (*r, *others), slots=tuple(range(len(r))), rows=rows)
    change = operation(*x).double() - operation(*r).double()
    required = torch.where(grad == 0, 0.0, grad.double() * change).sum()
    found = apply_rule(operation, r, x, grad)
    if not all(m.isfinite().all() for m in found):
        return math.inf
    attributed = sum(
        (m.double() * (b.double() - a.double())).sum() for m, a, b in zip(found, r, x, strict=True)
    )
    return float((attributed - required).abs() / required.abs())


def assert_shapley_values_of_two(target: Any, function: Callable[[Tensor], Tensor]) -> None:
    """Assert that the attributions of two arguments are the Shapley values of two players."""
    r, x = 0.5 + torch.rand(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = multipliers(target, tuple(r.split(1)), tuple(x.split(1)))
    exact = shapley_values(function, x, r).squeeze(1)
    torch.testing.assert_close(torch.cat(found) * (x - r), exact, rtol=1e-14, atol=1e-15)
