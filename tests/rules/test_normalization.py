"""Norms add up and are near the Shapley values from every reference."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from fxshap.rules.core.dispatch import apply_rule
from fxshap.testing.rule_check import TOLERANCE
from fxshap.verification.shapley import shapley_values
from tests.rules.helpers import FLOATS, bind_unary, row_error


@FLOATS
@pytest.mark.parametrize("far", [1e3, 1e6, 1e12])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm"])
def test_norms_add_up_where_one_endpoint_is_much_larger(name, far, dtype):
    """The two terms of c times 1/t cancelled, and left errors of the ratio of the endpoints."""
    generator = torch.Generator().manual_seed(1)
    r, x = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64).to(dtype)
    x[0] *= far
    x[1, 2] = far
    r[2] = 0
    x[2] *= far
    args = {"layer_norm": ([6], None, None, 1e-5), "rms_norm": ([6],), "group_norm": (1,)}[name]
    assert row_error(name, r, x, *args) <= TOLERANCE[dtype]


NORMS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "layer": ("layer_norm", ([8],)),
    "rms": ("rms_norm", ([8], None, 1e-6)),
    "group": ("group_norm", (1,)),
}


@pytest.mark.parametrize("kind", ["random", "tenth", "hundredth", "zero", "constant", "large"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_near_shapley_values_from_every_reference(norm: str, kind: str) -> None:
    """From a constant reference the attributions were of the size of 1 / sqrt(eps)."""
    name, args = NORMS[norm]
    operation = bind_unary(name, args=args)
    generator = torch.Generator().manual_seed(0)
    distances = []
    for _ in range(9):
        x, r, g = torch.randn(3, 1, 8, generator=generator, dtype=torch.float64)
        factor = {"tenth": 0.1, "hundredth": 0.01, "zero": 0.0, "large": 30.0}.get(kind, 1.0)
        r = torch.ones_like(r) * 0.7 if kind == "constant" else r * factor
        (m,) = apply_rule(operation, [r], [x], g)

        def value(point: Tensor, g: Tensor = g) -> Tensor:
            return (g * operation(point)).sum(-1, keepdim=True)

        exact = shapley_values(value, x[0], r[0]).squeeze(1)
        distances.append(float(((m * (x - r))[0] - exact).abs().sum() / exact.abs().sum()))
    assert statistics.median(distances) < 0.5
