"""Selections by a condition, and steps."""

from __future__ import annotations

import math

import pytest
import torch

from fxshap.rules.core.dispatch import apply_rule
from fxshap.rules.core.operation import Operation
from tests.rules.helpers import attributions_and_change, endpoints, multipliers

inf = math.inf


def test_select_divides_its_change_between_condition_and_branches() -> None:
    c, a, b = (torch.tensor([value], dtype=torch.float64) for value in (0.0, 2.0, 5.0))
    found = multipliers(torch.ops.fxshap.select.default, (c, a, b), (c + 1, a + 4, b + 2))
    assert torch.cat(found).tolist() == [4.0 - 6.0, 0.5, 0.5]


def test_an_infinite_branch_that_is_not_selected_gets_nothing() -> None:
    """where(x > 0, log(x), 0) from a reference below 0, whose logarithm is NaN."""
    c_r, c_x = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])
    a_r, a_x = torch.tensor([math.nan, -inf]), torch.tensor([2.0, -inf])
    operation, _ = Operation.bind(
        torch.ops.fxshap.select.default, (c_r, a_r, torch.zeros(2)), slots=(0, 1)
    )
    to_c, to_a = apply_rule(operation, (c_r, a_r), (c_x, a_x), torch.ones(2))
    assert (to_c * (c_x - c_r)).tolist() == [2.0, 0.0]
    assert to_a.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("size", [1e8, 1e30, 1e150])
def test_a_branch_that_is_huge_where_it_is_not_selected_gets_no_huge_attribution(size):
    """where(x > 0, y, x) far below 0: attributions of half the size of x cancelled."""
    select = torch.ops.fxshap.select.default
    for pairs in ((1.0, 0.0), (0.25, 0.75), (size, 2.0)), ((0.0, 1.0), (-size, 3.0), (0.5, size)):
        attributions, change = attributions_and_change(select, *endpoints(*pairs))
        assert sum(attributions) == pytest.approx(change, rel=1e-15)
        assert max(map(abs, attributions)) <= max(abs(change), 3)


def test_a_step_over_a_denormal_difference_has_a_multiplier_for_a_small_cotangent():
    """1 / 1e-310 is infinite, but 1e-10 / 1e-310 is not."""
    r, x = endpoints((0.0, 1e-310))
    operation, _ = Operation.bind(torch.ops.fxshap.step.default, (r[0], "gt"))
    (m,) = apply_rule(operation, r, x, torch.full((1,), 1e-10, dtype=torch.float64))
    assert (m * (x[0] - r[0])).item() == pytest.approx(1e-10)
