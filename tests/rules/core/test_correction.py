"""The correction that restores a finite difference."""

from __future__ import annotations

import pytest
import torch

from fxshap.rules.core.correction import restore
from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from tests.rules.helpers import total_error

aten = torch.ops.aten


def test_the_change_for_a_huge_difference_may_overflow():
    """2 * 1.9e38 overflows float32, but over a difference of 5e26 its multiplier is 7e11."""
    r, x = torch.tensor([5.2e26, 3.6e11]), torch.tensor([-4.2, 3.6e11])
    for target in (aten.cumprod.default, aten.prod.dim_int):
        operation, _ = Operation.bind(target, (r, 0), rows=(None, None))
        (m,) = apply_rule(operation, [r], [x], torch.full_like(operation(r), 2.0))
        assert m[0].item() == pytest.approx(2 * 3.6e11, rel=1e-6)


def test_tensors_without_a_batch_dimension_are_one_row():
    """Three quantiles of 6 x 3 numbers counted as 3 rows of 6, and one of them did not change."""
    r = torch.arange(18.0).reshape(6, 3) * 7 % 18
    x = r.clone()
    x[0] += 100.0
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    assert total_error(aten.quantile.default, [r], [x], torch.ones(3), quantiles) < 1e-6


def test_what_is_lacking_is_shared_in_proportion():
    multipliers = torch.tensor([[1.0, -2.0, 0.0, 3.0]])
    steps = torch.tensor([[2.0, 1.0, 5.0, 0.0]])
    restored = restore(multipliers, steps, torch.tensor([[4.0]])) * steps
    torch.testing.assert_close(restored, torch.tensor([[4.0, 0.0, 0.0, 0.0]]))


def test_without_attributions_the_correction_is_the_smallest():
    steps = torch.tensor([[3.0, 4.0]])
    restored = restore(torch.zeros(1, 2), steps, torch.tensor([[50.0]]))
    torch.testing.assert_close(restored, torch.tensor([[6.0, 8.0]]))
