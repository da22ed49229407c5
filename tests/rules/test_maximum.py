"""Multipliers of a maximum: Shapley values of the max game."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fxshap.rules.maximum import max_multiplier
from fxshap.verification.shapley import shapley_values
from tests.rules.helpers import assert_shapley_values_of_two

aten = torch.ops.aten

inf = math.inf


@pytest.mark.parametrize("players", range(2, 7))
@pytest.mark.parametrize("ties", [False, True])
def test_maximum_is_the_shapley_value(players: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(players)
    for _ in range(20):
        r, x = torch.randn(2, players, generator=generator, dtype=torch.float64)
        if ties:
            r, x = (2 * r).round() / 2, (2 * x).round() / 2
        exact = shapley_values(lambda z: z.amax(1, keepdim=True), x, r).squeeze(1)
        multiplier = max_multiplier(r, x)
        torch.testing.assert_close(multiplier * (x - r), exact, rtol=0, atol=1e-14)
        assert multiplier.min() >= 0
        assert multiplier.max() <= 1 + 1e-15


def test_masked_elements_of_a_maximum_have_multipliers_of_0() -> None:
    r = torch.tensor([[-inf, 1.0, 2.0], [-inf, 3.0, 3.0]])
    x = torch.tensor([[-inf, 4.0, 2.0], [-inf, 3.0, 3.0]])
    expected = torch.tensor([[0.0, 2 / 3, 0.0], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(max_multiplier(r, x), expected)


def test_maximum_of_many_equal_elements_gives_them_equal_parts() -> None:
    r, x = torch.zeros(1, 200, dtype=torch.float64), torch.ones(1, 200, dtype=torch.float64)
    torch.testing.assert_close(max_multiplier(r, x), x / 200)


@pytest.mark.parametrize(
    ("target", "function"),
    [
        (aten.maximum.default, lambda z: z.amax(1, keepdim=True)),
        (aten.minimum.default, lambda z: z.amin(1, keepdim=True)),
    ],
    ids=["maximum", "minimum"],
)
def test_two_tensors_have_the_shapley_values_of_two_players(target: Any, function: Any) -> None:
    assert_shapley_values_of_two(target, function)
