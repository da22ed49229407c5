"""Softmax, log_softmax, logsumexp and logcumsumexp, also at logits of any size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from fxshap.testing.rule_check import TOLERANCE, Case, Varying, additivity_errors, cotangents
from fxshap.verification.shapley import shapley_values
from tests.rules.cases.base import v
from tests.rules.helpers import FLOATS, bind_unary, row_error

aten = torch.ops.aten
inf = math.inf

SOFTMAXES = (aten.softmax.int, aten._safe_softmax.default, aten.log_softmax.int)


@pytest.mark.parametrize("scale", [1, 10, 50, 100])
@pytest.mark.parametrize("target", [*SOFTMAXES, aten.logsumexp.default], ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
def test_logits_of_any_scale_add_up(
    target: Any, scale: float, dtype: torch.dtype, bound: float
) -> None:
    dim = [1] if target is aten.logsumexp.default else 1
    case = Case(target, (v(8), dim))
    generator = torch.Generator().manual_seed(0)
    r, x = scale * torch.randn(2, 32, 8, generator=generator, dtype=torch.float64).to(dtype)
    operation, _ = Operation.bind(target, (r, dim), rows=(0, 0))
    errors, (multiplier,) = additivity_errors(case, operation, [r], [x])
    assert errors.max() <= bound
    assert multiplier.isfinite().all()


@pytest.mark.parametrize("target", SOFTMAXES, ids=str)
def test_masked_logits_have_multipliers_of_0(target: Any) -> None:
    case = Case(target, (Varying((4, 6), masked=True), -1))
    operation, r, x = case.draw(torch.float32)
    (multiplier,) = apply_rule(operation, r, x, cotangents(operation(*r)))
    assert multiplier[..., 1].eq(0).all()
    assert multiplier.isfinite().all()


def test_a_fully_masked_row_has_multipliers_of_0() -> None:
    r, x = torch.randn(2, 3, 4)
    r[1] = x[1] = -inf
    operation, _ = Operation.bind(aten._safe_softmax.default, (r, -1))
    (multiplier,) = apply_rule(operation, [r], [x], torch.randn(3, 4))
    assert multiplier[1].eq(0).all()
    assert multiplier.isfinite().all()


def test_softmax_multipliers_are_bounded_and_invariant_to_a_common_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    r, x = 30 * torch.randn(2, 1000, 8, generator=generator, dtype=torch.float64)
    grad = torch.rand(1000, 8, generator=generator, dtype=torch.float64)
    operation, _ = Operation.bind(aten.softmax.int, (r, 1))
    (multiplier,) = apply_rule(operation, [r], [x], grad)
    (shifted,) = apply_rule(operation, [r + 7], [x + 7], grad)
    assert multiplier.abs().max() <= 1
    torch.testing.assert_close(shifted, multiplier, rtol=0, atol=1e-12)


@FLOATS
@pytest.mark.parametrize("far", [1e4, 1e8, 1e15, 1e25])
def test_softmax_adds_up_where_a_logit_changes_much(far, dtype):
    """m is 1 - 1/far, and a floating-point number near 1 cannot hold the difference."""
    r = torch.tensor([[1.0, 0.5, -1.0], [0.0, far, 2 * far], [far, -far, 0.0]], dtype=dtype)
    x = torch.tensor([[1.0, 0.5, far], [-far, 1.0, 2.0], [far, -far, far]], dtype=dtype)
    assert row_error("softmax.int", r, x, -1) <= TOLERANCE[dtype]


@pytest.mark.parametrize("far", [1e6, 1e12, 1e150])
def test_logits_that_change_together_get_no_more_than_the_change_of_softmax(far):
    """A token equals the others: the closed form gave +-far / 4, whose sum had no digits."""
    r = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64) * far
    x = torch.tensor([[-2.0, -0.5, -0.5], [1.0, 1.0, 1.0]], dtype=torch.float64) * far
    g = torch.tensor([[4.0, 3.0, 3.0], [1.0, -1.0, 0.5]], dtype=torch.float64)
    operation = bind_unary("softmax.int", args=(-1,))
    (m,) = apply_rule(operation, [r], [x], g)
    parts = m * (x - r)
    change = (g * (operation(x) - operation(r))).sum(-1)
    torch.testing.assert_close(parts.sum(-1), change, rtol=0, atol=1e-12)
    assert (parts.abs() <= g.amax(-1, keepdim=True) - g.amin(-1, keepdim=True) + 1e-12).all()


@pytest.mark.parametrize("offset", [1e12, 1e285])
@pytest.mark.parametrize("far", [1e17, 1e285])
def test_attention_to_huge_values_that_are_close_gets_no_more_than_its_change(far, offset):
    """For values near 1e12 the attributions were 1e12, and for those near 1e285 they overflowed."""
    r = torch.tensor([[3.0, 1.0, -1.0], [0.0, 0.0, 0.0]], dtype=torch.float64) * far
    x = torch.tensor([[4.0, 6.0, 0.5], [-1.0, -1.5, -3.0]], dtype=torch.float64) * far
    values = torch.tensor([[0.0, 1e5, -2e12]] * 2, dtype=torch.float64) * (offset / 1e12) + offset
    operation = bind_unary("softmax.int", args=(-1,))
    (m,) = apply_rule(operation, [r], [x], values)
    parts = m * (x - r)
    change = ((values - values[:, :1]) * (operation(x) - operation(r))).sum(-1)
    error = (parts.sum(-1) - change).abs()
    assert (error <= 1e-15 * values.abs().amax(-1)).all()
    assert (parts[0].abs() <= 1.5e5 * (offset / 1e12)).all()


def test_two_logits_that_change_much_have_their_shapley_values():
    r, x = torch.zeros(1, 2).double(), torch.full((1, 2), 1e8).double()
    operation = bind_unary("softmax.int", args=(-1,))
    g = torch.tensor([[1.0, 0.0]]).double()
    (m,) = apply_rule(operation, [r], [x], g)
    exact = shapley_values(lambda a: (g * operation(a)).sum(-1, keepdim=True), x[0], r[0])
    torch.testing.assert_close((m * (x - r))[0], exact.squeeze(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("size", [1e3, 1e30, 1e150])
def test_logcumsumexp_keeps_the_digits_of_its_change(size, dim):
    """The derivatives cancelled where a logit changes much; PyTorch's lost a small cotangent."""
    r = torch.tensor([[0.0, -1.0, 2.0, 0.5], [0.5, 0.5, 0.0, 1.0]]).double()
    r, x = torch.stack([r, 2 * r]), torch.stack([r + 1, r])
    r[0, 0] = r.new_tensor([0.0, -size, size, 1.0])
    x[0, 0] = r.new_tensor([-size, 0.0, size, 3 * size])
    r[1, 1], x[1, 1] = 0.0, size  # all equal
    r, x = (end.movedim(2, dim).contiguous() for end in (r, x))
    rows = (1, 1) if dim == 0 else (0, 0)
    operation, _ = Operation.bind(aten.logcumsumexp.default, (r, dim), rows=rows)
    for g in (torch.ones_like(r), torch.full_like(r, 0.25 / size)):
        (m,) = apply_rule(operation, [r], [x], g)
        parts, change = m * (x - r), g * (operation(x) - operation(r))
        error = (parts.sum(dim) - change.sum(dim)).abs()
        assert (error <= 1e-14 * change.abs().sum(dim).clamp(min=float(g.max()))).all()


@FLOATS
@pytest.mark.parametrize("far", [1e3, 9714451324.636723, 1e25])
@pytest.mark.parametrize("masked", [False, True])
def test_log_softmax_adds_up_where_a_logit_dominates_its_row(masked, far, dtype):
    """m is 1 - 1/far and the other cotangents are 0: nothing was left of g (1 - m)."""
    r, x = (torch.tensor([[a, -4.5, 1.0, -0.5]], dtype=dtype) for a in (far, -2.0))
    if masked:
        r[:, 1] = x[:, 1] = -math.inf
    g = torch.tensor([[1.5, 0.0, 0.0, 0.0]], dtype=dtype)
    operation = bind_unary("log_softmax.int", args=(-1,))
    (m,) = apply_rule(operation, [r], [x], g)
    attributed = m[0, 0].double() * (x[0, 0].double() - r[0, 0].double())
    change = (g * (operation(x) - operation(r)))[0, 0]
    assert attributed.item() == pytest.approx(change.item(), rel=4 * torch.finfo(dtype).eps)
