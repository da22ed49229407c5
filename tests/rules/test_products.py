"""Products and quotients: midpoints, and one order of the factors beside huge values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import TOLERANCE, Case, additivity_errors
from tests.helpers import assert_exact
from tests.rules.cases.base import v
from tests.rules.helpers import (
    FLOATS,
    assert_shapley_values_of_two,
    attributions_and_change,
    endpoints,
    total_error,
)

aten = torch.ops.aten


def test_products_of_real_and_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    a_r, a_x = torch.randn(2, 32, 4, generator=generator, dtype=torch.float64)
    b_r, b_x = torch.randn(2, 32, 4, generator=generator, dtype=torch.complex128)
    case = Case(aten.mul.Tensor, (v(4), v(4)))
    operation, _ = Operation.bind(aten.mul.Tensor, (a_r, b_r), slots=(0, 1))
    errors, _ = additivity_errors(case, operation, [a_r, b_r], [a_x, b_x])
    assert errors.max() <= 1e-14


@pytest.mark.parametrize("size", [1e8, 1e30, 1e150])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_gate_that_closes_on_a_huge_value_gets_no_huge_attribution(swapped, size):
    """x * (x > 0) and x * sigmoid(x) far below 0: attributions of half the size of x cancelled."""
    pairs = endpoints((0.5, -size), (1.0, 0.0))
    attributions, change = attributions_and_change(
        aten.mul.Tensor, *(end[::-1] if swapped else end for end in pairs)
    )
    assert sum(attributions) == pytest.approx(change, rel=1e-15)
    assert max(map(abs, attributions)) <= 1


def test_a_tiny_product_keeps_the_digits_of_its_change():
    """A step after 2000 * sigmoid(-100) magnified what cancelled to 1e40."""
    attributions, change = attributions_and_change(
        aten.mul.Tensor, *endpoints((2000.0, 0.0), (1e-43, 0.5))
    )
    assert sum(attributions) == pytest.approx(change, rel=1e-15)


def test_factors_of_ordinary_size_have_midpoints_as_multipliers():
    attributions, _ = attributions_and_change(aten.mul.Tensor, *endpoints((0.0, 100.0), (1.0, 0.0)))
    assert attributions == [50, -50]
    assert attributions_and_change(aten.mul.Tensor, *endpoints((1.0, 0.0), (0.0, 1.0)))[0] == [
        -0.5,
        0.5,
    ]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "shapes", [((2, 3), (3, 4)), ((3,), (3, 4)), ((2, 3), (3,)), ((3,), (3,)), ((5, 2, 3), (3, 4))]
)
def test_attention_weights_that_vanish_for_huge_values_add_up(shapes, swapped):
    """Attributions of half of 1e30 cancelled in the matrix product."""
    generator = torch.Generator().manual_seed(0)
    r, x = (
        [torch.rand(2, *shape, generator=generator).double()[0] for shape in shapes]
        for _ in range(2)
    )
    r[0][..., 0], x[0][..., 0] = 0.5, 0.0
    x[1][:1] *= 1e30
    r, x = (x, r) if swapped else (r, x)
    operation, _ = Operation.bind(aten.matmul.default, r, slots=(0, 1))
    y_r, y_x = operation(*r), operation(*x)
    found = apply_rule(operation, r, x, torch.ones_like(y_r))
    parts = [(m * (b - a)) for m, a, b in zip(found, r, x, strict=True)]
    assert sum(p.sum() for p in parts).item() == pytest.approx((y_x - y_r).sum().item(), rel=1e-12)
    assert max(p.abs().max() for p in parts) < 10


@FLOATS
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("size", [1e8, 4e18])
def test_factors_of_sums_of_products_change_in_one_order_beside_huge_values(size, swapped, dtype):
    """Products of mixed endpoints, of 5e27, cancelled under a cotangent and lost all digits."""
    r = [torch.tensor([[1e-20, 44.0]]), torch.tensor([[-size, 5.0]])]
    x = [torch.tensor([[-size, 44.5]]), torch.tensor([[-1e-30, 3.0]])]
    r, x = ([value.to(dtype) for value in end] for end in ((x, r) if swapped else (r, x)))
    weight = torch.tensor([[[1.0, 0.5], [0.25, 1.0]], [[-1.0, 0.5], [0.5, 2.0]]], dtype=dtype)
    g = torch.ones(1, 2, dtype=dtype)
    assert total_error(aten.bilinear.default, r, x, g, weight, None) < TOLERANCE[dtype]
    operation, _ = Operation.bind(aten.einsum.default, ("bi,bi->b", r), slots=(1, 2))
    found = apply_rule(operation, r, x, g[:, 0])
    parts = torch.cat([m * (b - a) for m, a, b in zip(found, r, x, strict=True)])
    change = (operation(*x) - operation(*r)).item()
    assert parts.sum().item() == pytest.approx(change, rel=TOLERANCE[dtype])
    assert parts.abs().max() <= 100 * size


def test_rows_of_ordinary_size_have_midpoints_beside_huge_rows():
    r = [torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0, -1.0], [-1e9, 1.0]])]
    x = [torch.tensor([[0.5, 4.0], [1e9, 1.0]]), torch.tensor([[2.0, 1.5], [0.0, 1.0]])]
    operation, _ = Operation.bind(aten.linalg_vecdot.default, r, slots=(0, 1))
    found = apply_rule(operation, r, x, torch.ones(2))
    for m, a, b in zip(found, reversed(r), reversed(x), strict=True):
        torch.testing.assert_close(m[0], (a[0] + b[0]) / 2)


UNIT_LENGTH: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda x: F.normalize(x, dim=1)[:, :1],
    "cosine": lambda x: F.cosine_similarity(x, x.new_ones(1, 4)).unsqueeze(1),
    "by hand": lambda x: x[:, :1] / (x.norm(dim=1, keepdim=True) + 1e-9),
}


@FLOATS
@pytest.mark.parametrize("near", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize("name", UNIT_LENGTH)
def test_vectors_of_unit_length_are_explained_from_zeros(name, near, dtype):
    """As a product with 1/b, the quotient had attributions of 1e11, whose sum had no digits."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return UNIT_LENGTH[name](x)

    reference = torch.full((1, 4), near, dtype=dtype)
    sample = torch.tensor([[1.0, 2.0, -1.0, 0.5]], dtype=dtype)
    explainable = fxshap.make_explainable(Model())
    (phi,) = assert_exact(Model(), explainable, [reference], [sample], TOLERANCE[dtype])
    assert abs(phi).max() < 2


@pytest.mark.parametrize(
    ("target", "function"),
    [
        (aten.mul.Tensor, lambda z: z[:, :1] * z[:, 1:]),
        (aten.div.Tensor, lambda z: z[:, :1] / z[:, 1:]),
    ],
    ids=["mul", "div"],
)
def test_two_factors_have_the_shapley_values_of_two_players(target: Any, function: Any) -> None:
    assert_shapley_values_of_two(target, function)
