"""Of several values that are written to one position, only the last has an effect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxshap
from tests.helpers import Between, assert_exact

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}

#: Goes to 0, 2, 5 and 1; what goes to 0 and to 2 first is overwritten.
POSITION = torch.tensor([0, 2, 2, 5, 1, 0])
STAYS = torch.tensor([False, False, True, True, True, True])


def assigned(h: Tensor) -> Tensor:
    out = h.cos()
    out[:, POSITION] = h.sin()
    return out


def assigned_in_rows(h: Tensor) -> Tensor:
    out = h.cos()
    out[torch.arange(len(h))[:, None], POSITION] = h.sin()
    return out


def scattered(h: Tensor) -> Tensor:
    return h.cos().scatter(1, POSITION.expand(len(h), 6), h.sin())


def copied(h: Tensor) -> Tensor:
    return h.cos().index_copy(1, POSITION, h.sin())


def copied_rows(h: Tensor) -> Tensor:
    repeated = h.unsqueeze(1) * torch.ones(6, 1).to(h)
    return repeated.cos().index_copy(1, POSITION, repeated.sin())[..., 0]


WAYS = [assigned, assigned_in_rows, scattered, copied]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("function", [*WAYS, copied_rows], ids=lambda f: f.__name__)
def test_what_is_overwritten_adds_up(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    background, samples = (torch.randn(n, 4, generator=generator).to(dtype) for n in (5, 3))
    model = Between(function).to(dtype)
    assert_exact(model, fxshap.make_explainable(model), [background], [samples], LIMITS[dtype])


@pytest.mark.parametrize("function", WAYS, ids=lambda f: f.__name__)
def test_what_is_overwritten_counts_nothing(function: Callable[[Tensor], Tensor]) -> None:
    """The function of every number by itself: only the value that stays is one of it."""

    class Numbers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    generator = torch.Generator().manual_seed(0)
    background, samples = (torch.randn(n, 6, generator=generator).double() for n in (1, 2))
    (values,) = assert_exact(
        Numbers(), fxshap.make_explainable(Numbers()), [background], [samples], 1e-12
    )
    written = samples.sin() - background.sin()
    expected = torch.zeros(2, 6, 6, dtype=torch.float64)
    for feature, position in enumerate(POSITION.tolist()):
        expected[:, feature, position] = written[:, feature] * STAYS[feature]
    for position in (3, 4):  # nothing is written there
        change = samples[:, position].cos() - background[:, position].cos()
        expected[:, position, position] = change
    torch.testing.assert_close(torch.from_numpy(values), expected)
