"""The generic rule restores the finite difference of every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.generic import generic
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import TOLERANCE, Case, additivity_errors
from tests.rules.cases.base import v
from tests.rules.helpers import FLOATS

aten = torch.ops.aten


def test_rows_that_two_arguments_share_are_corrected() -> None:
    """One argument has 32 rows, and the other has 4 rows for each of them."""
    case = Case(aten.atan2.default, (v(4), v(4)))
    generator = torch.Generator().manual_seed(0)
    (a_r, b_r), (a_x, b_x) = torch.randn(2, 2, 32, 4, generator=generator, dtype=torch.float64)

    def folded(a: Tensor, b: Tensor) -> Tensor:
        return torch.atan2(a, b.reshape(32, 4))

    endpoints = [a_r, b_r.flatten()], [a_x, b_x.flatten()]
    operation, _ = Operation.bind(folded, endpoints[0], slots=(0, 1))
    errors, _ = additivity_errors(case, operation, *endpoints)
    assert errors.max() <= 1e-13


def generic_error(target: Any, r: list[Tensor], x: list[Tensor], *others: Any) -> float:
    operation, _ = Operation.bind(target, (*r, *others), slots=tuple(range(len(r))))
    y_r, y_x = operation(*r), operation(*x)
    assert isinstance(y_r, Tensor) and isinstance(y_x, Tensor)
    grads = generic(operation, r, x, torch.ones_like(y_r))
    pairs = zip(grads, r, x, strict=True)
    attributed = sum((m * (b - a)).flatten(1).sum(1) for m, a, b in pairs if m is not None)
    assert isinstance(attributed, Tensor)
    change = (y_x - y_r).flatten(1).sum(1)
    return float(((attributed - change).abs() / torch.maximum(y_x.abs(), y_r.abs()).amax(1)).max())


@FLOATS
@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e12, 1e25, 1e200])
def test_differences_whose_square_overflows_or_vanishes_add_up(size, dtype):
    """<d, d> overflowed or was 0, and the correction was lost."""
    if not 0 < torch.tensor(size, dtype=dtype) < torch.inf:
        pytest.skip("no number of this dtype")
    r = torch.tensor([[1.0, -0.5, 3.0, 0.25], [2.0, 1.0, 0.0, -1.0]], dtype=dtype) * size
    x = torch.tensor([[0.5, 2.0, -1.0, 0.125], [1.0, 3.0, -2.0, 0.0]], dtype=dtype) * size
    error = generic_error(aten.logcumsumexp.default, [r], [x], 1)
    assert error <= 10 * TOLERANCE[dtype]


@FLOATS
@pytest.mark.parametrize("target", [aten.linalg_inv.default, aten.linalg_matrix_exp.default])
@pytest.mark.parametrize("differs", [(0, 0), (0, 1), (1, 1)])
def test_one_element_that_changes_others_is_not_taken_for_an_activation(target, differs, dtype):
    """A triangular matrix stays so, and few elements of the result change."""
    r = torch.tensor([[[1.0, 2.0], [0.0, 3.0]]], dtype=dtype)
    x = r.clone()
    x[0][differs] += 1.5
    assert generic_error(target, [r], [x]) <= 10 * TOLERANCE[dtype]


@FLOATS
def test_a_singularity_on_the_path_is_passed(dtype):
    """The angle has no derivative at the origin, halfway between opposite points."""
    y = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    x = torch.tensor([[0.5, 1.0, 3.0]], dtype=dtype)
    assert generic_error(aten.atan2.default, [y, x], [-y, -x]) <= TOLERANCE[dtype]


@FLOATS
def test_infinite_derivatives_of_outputs_with_zero_cotangent_are_ignored(dtype):
    """0 * inf made all multipliers of the row NaN."""
    r, x = torch.tensor([[1.0, 2.0]], dtype=dtype), torch.tensor([[0.0, 3.0]], dtype=dtype)
    exponent = torch.tensor([[-1.0, 2.0]], dtype=dtype)
    operation, _ = Operation.bind(aten.pow.Tensor_Tensor, (r, exponent), slots=(0,))
    (m,) = apply_rule(operation, [r], [x], torch.tensor([[0.0, 1.0]], dtype=dtype))
    assert (m * (x - r)).sum().item() == pytest.approx(5, rel=TOLERANCE[dtype])


@FLOATS
def test_small_changes_are_exact_beside_huge_differences(dtype):
    """A gather whose index leaves a number of 1e25."""
    r = torch.tensor([[-5.0, -0.2, 4.7]], dtype=dtype)
    x = torch.tensor([[-5.0, -8.6e25, 5.2]], dtype=dtype)
    endpoints = [r, torch.tensor([[0, 1]])], [x, torch.tensor([[0, 2]])]
    operation, _ = Operation.bind(aten.gather.default, (r, 1, endpoints[0][1]), slots=(0, 2))
    m, _ = apply_rule(operation, *endpoints, torch.tensor([[1.0, 1.4]], dtype=dtype))
    attributed = (m.double() * (x.double() - r.double())).sum().item()
    assert attributed == pytest.approx(1.4 * (5.2 + 0.2), rel=TOLERANCE[dtype])


def multipliers(function: Any, r: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    operation, _ = Operation.bind(function, (r,), rows=(0, 0))
    (m,) = generic(operation, [r], [x], grad)
    assert m is not None
    return m


def endpoints(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    r, x = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return r, x


MATRICES = {
    "svdvals": torch.linalg.svdvals,
    "qr": lambda a: torch.linalg.qr(a).R,
    "matrix_exp": torch.matrix_exp,
    "inv": torch.linalg.inv,
}


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_whose_result_is_not_used_gets_nothing(name):
    """The smallest correction gave it up to 38 % of the attributions."""
    r, x = endpoints(4, 2, 3, 3)
    before, after = MATRICES[name](r), MATRICES[name](x)
    grad = torch.zeros_like(before)
    grad[:, 0] = 1.0
    m = multipliers(MATRICES[name], r, x, grad)
    assert (m[:, 1] == 0).all()
    attributed = (m * (x - r)).flatten(1).sum(1)
    torch.testing.assert_close(attributed, (grad * (after - before)).flatten(1).sum(1))


@pytest.mark.parametrize("name", MATRICES)
def test_strides_do_not_matter(name):
    r, x = endpoints(4, 2, 3, 3)
    grad = torch.ones_like(MATRICES[name](r))
    expected = multipliers(MATRICES[name], r, x, grad)
    strided = [v.movedim(0, -1).contiguous().movedim(-1, 0) for v in (r, x, grad)]
    torch.testing.assert_close(multipliers(MATRICES[name], *strided), expected)


def test_an_elementwise_operation_has_its_secants():
    def snake(x: Tensor) -> Tensor:
        return x + torch.sin(3 * x) ** 2

    r, x = endpoints(4, 8)
    x[:, 5] = r[:, 5]
    m = multipliers(snake, r, x, torch.ones_like(r))
    secant = (snake(x) - snake(r)) / (x - r)
    different = x != r
    torch.testing.assert_close(m[different], secant[different])


def test_an_elementwise_operation_without_a_derivative_has_its_secants():
    """All derivatives of a step are 0, so there is nothing to be in proportion to."""
    r, x = endpoints(4, 8)
    m = multipliers(lambda x: torch.floor(2 * x), r, x, torch.ones_like(r))
    torch.testing.assert_close(m * (x - r), torch.floor(2 * x) - torch.floor(2 * r))
