"""Models that compute only where a mask is True: assigned, added, and routed to experts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap._compat import TORCH
from fxshap.errors import CaptureError
from fxshap.verification.shapley import shapley_values
from tests.helpers import Between, assert_exact, explain

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


def data(dtype: torch.dtype, rows: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return 2 * torch.randn(rows, 4, generator=generator, dtype=torch.float64).to(dtype)


# --- assignment by a mask ------------------------------------------------------------------------


def by_a_number(h: Tensor) -> Tensor:
    h = h.clone()
    h[h < 0] = 0.3
    return h.sin()


def by_itself(h: Tensor) -> Tensor:
    h = h.clone()
    h[h > 0] *= 2.0
    h[h < -1] += 1.0
    return h


def by_its_square(h: Tensor) -> Tensor:
    h = h.clone()
    h[h < 0] = h[h < 0] ** 2  # the mask is written twice
    return h


def from_elsewhere(h: Tensor) -> Tensor:
    out, mask = torch.full_like(h, -3.0), h > 0
    out[mask] = h.sin()[mask] * h[mask].log() + 1
    return out


def entire_rows(h: Tensor) -> Tensor:
    h = h.clone()
    mask = h[:, 0] > 0
    h[mask] = F.gelu(h[mask]) * h[mask].sum(-1, keepdim=True).tanh()
    return h


def groups(h: Tensor) -> Tensor:
    h = h.clone().reshape(-1, 2, 3)
    mask = h.sum(2) > 0
    h[mask] = h[mask].softmax(-1)[:, [1, 0, 2]]
    return h.flatten(1)


def groups_by_one_of_all(h: Tensor) -> Tensor:
    h = h.clone().reshape(-1, 2, 3)
    h[h.sum(2) > 0] = torch.arange(3).to(h)
    return h.flatten(1)


def one_column(h: Tensor) -> Tensor:
    h = h.clone()
    mask = h[:, 0] > 0
    h[mask, 1] = h[mask, 2].exp()
    return h


def a_mask_in_a_mask(h: Tensor) -> Tensor:
    h, mask = h.clone(), h > 0
    inner = h[mask]
    inner[inner > 1] = 1.0
    h[mask] = inner.sqrt()
    return h


def two_conditions(h: Tensor) -> Tensor:
    h = h.clone()
    h[(h > 0) & (h < 1)] *= 3.0
    return h


def selected(h: Tensor) -> Tensor:
    h, mask = h.clone(), h > 0
    h[mask] = h.masked_select(mask).log1p()
    return h


def at_indices(h: Tensor) -> Tensor:
    row, column = torch.where(h > 0)
    out = torch.zeros_like(h)
    out[row, column] = h[row, column].exp()
    return out


def added_at_one_index(h: Tensor) -> Tensor:
    row, column = (h > 0).nonzero(as_tuple=True)
    out = torch.zeros_like(h[:, :1]).index_add(0, row, h[row, column, None] ** 2, alpha=0.5)
    return out * h.tanh()


def copied_to_rows(h: Tensor) -> Tensor:
    rows = (h[:, 0] > 0).nonzero().squeeze(-1)
    return torch.zeros_like(h).index_copy(0, rows, h[rows] ** 2)


def added_to_rows(h: Tensor) -> Tensor:
    rows = (h[:, 0] > 0).nonzero().squeeze(-1)
    return h.cos().index_add(0, rows, h[rows] ** 2, alpha=0.5)


def in_a_slice(h: Tensor) -> Tensor:
    h = h.clone()
    right = h[:, 3:]
    right[right > 1] = 1.0
    return h


UPDATES = [
    by_a_number, by_itself, by_its_square, from_elsewhere, entire_rows, groups,
    groups_by_one_of_all, one_column, a_mask_in_a_mask, two_conditions, selected,
    at_indices, added_at_one_index, copied_to_rows, added_to_rows, in_a_slice,
]  # fmt: skip


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("update", UPDATES, ids=lambda f: f.__name__)
def test_what_a_mask_holds_adds_up(update: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    model, background, samples = Between(update).to(dtype), data(dtype), data(dtype, 3)
    explainable = fxshap.make_explainable(model, samples)
    assert_exact(model, explainable, [background], [samples], LIMITS[dtype])
    (output, _), expected = explainable.tapped_graph(samples), model(samples)
    torch.testing.assert_close(output, expected)


def test_an_assignment_has_the_values_of_a_choice() -> None:
    def assigned(h: Tensor) -> Tensor:
        out = h.clone()
        out[h < 0] = h[h < 0].exp() - 1
        return out

    def chosen(h: Tensor) -> Tensor:
        return torch.where(h < 0, h.exp() - 1, h)

    x, background = data(torch.float64, 3), data(torch.float64)
    (values,), (expected,) = (
        explain(fxshap.make_explainable(Between(f).double()), [background], [x])
        for f in (assigned, chosen)
    )
    assert abs(values - expected).max() <= 1e-14 * abs(expected).max()


FEATURES = torch.tensor([True, False, True, True, False, True])


def by_a_constant_mask(h: Tensor) -> Tensor:
    out = h.sin()
    out[:, FEATURES] = h[:, FEATURES].softmax(-1)  # not elementwise
    return out


def by_constant_indices(h: Tensor) -> Tensor:
    (features,) = torch.where(FEATURES)
    out = h.sin()
    out[:, features] = h[:, features].softmax(-1)
    return out


def selected_by_a_constant_mask(h: Tensor) -> Tensor:
    chosen = h.masked_select(FEATURES.expand_as(h)).reshape(h.shape[0], -1).softmax(-1)
    return torch.cat([chosen, h[:, :2]], 1)


@pytest.mark.parametrize(
    "function", [by_a_constant_mask, by_constant_indices, selected_by_a_constant_mask]
)
def test_a_constant_mask_holds_as_much_for_every_input(
    function: Callable[[Tensor], Tensor],
) -> None:
    if function is selected_by_a_constant_mask and TORCH < (2, 9):
        pytest.skip("torch.export of this release cannot reshape the elements that a mask selects")
    model, float64 = Between(function).double(), torch.float64
    explainable = fxshap.make_explainable(model)
    assert_exact(model, explainable, [data(float64)], [data(float64, 3)], LIMITS[float64])


def minus_their_mean(h: Tensor) -> Tensor:
    h, mask = h.clone(), h > 0
    h[mask] = h[mask] - h[mask].mean()
    return h


def by_their_number(h: Tensor) -> Tensor:
    h, mask = h.clone(), h > 0
    h[mask] = h[mask] / h[mask].shape[0]
    return h


def softmax_of_all(h: Tensor) -> Tensor:
    h, mask = h.clone(), h > 0
    h[mask] = h[mask].softmax(0)
    return h


def counted(h: Tensor) -> Tensor:
    h, mask = h.clone(), h > 0
    h[mask] = h[mask].cumsum(0)
    return h


def other_positions(h: Tensor) -> Tensor:
    h = h.clone()
    h[h > 0] = -h[(-h) < 0]  # the same positions, but only for these values
    return h


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (minus_their_mean, r"helpers.py:\d+ .* the size of a tensor depends on values"),
        (other_positions, r"helpers.py:\d+ .* the size of a tensor depends on values"),
        (by_their_number, r"helpers.py:\d+ .* the size of a tensor depends on values"),
        (softmax_of_all, "depends on how many elements the mask selects"),
        (counted, "depends on how many elements the mask selects"),
    ],
)
def test_functions_of_several_elements_are_rejected(
    function: Callable[[Tensor], Tensor], message: str
) -> None:
    explainable = fxshap.make_explainable(Between(function))
    with pytest.raises(CaptureError, match=message):
        explain(explainable, [data(torch.float32)], [data(torch.float32, 3)])


# --- experts -------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two of three experts for each of five tokens, by one of the ways in which people write it."""

    def __init__(self, call: Callable[[nn.ModuleList, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(2, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 2)) for _ in range(3)
        )
        self.head = nn.Linear(10, 2)
        self.call = call
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 2)
        weights, chosen = self.gate(3 * tokens).softmax(-1).topk(2)
        return self.head(self.call(self.experts, tokens, weights, chosen).reshape(-1, 10))


def dense(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Every expert for every token."""
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        weight = torch.where(chosen == number, weights, 0.0).sum(-1, keepdim=True)
        out = out + weight * expert(x)
    return out


def by_mask(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        mask = (chosen == number).any(-1)
        weight = torch.where(chosen == number, weights, 0.0).sum(-1)
        out[mask] += weight[mask].unsqueeze(-1) * expert(x[mask])
    return out


def by_index(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        at, slot = torch.where(chosen == number)
        out.index_add_(0, at, expert(x[at]) * weights[at, slot, None])
    return out


def by_one_hot(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """As transformers did (Mixtral)."""
    out = torch.zeros_like(x)
    hot = F.one_hot(chosen, len(experts)).permute(2, 1, 0)
    for number, expert in enumerate(experts):
        slot, at = torch.where(hot[number])
        tokens = x[None, at].reshape(-1, x.shape[-1])
        out.index_add_(0, at, expert(tokens) * weights[at, slot, None])
    return out


def by_nonzero(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for slot in range(chosen.shape[1]):
        for number, expert in enumerate(experts):
            at = (chosen[:, slot] == number).nonzero()[:, 0]
            out[at] += weights[at, slot].unsqueeze(-1) * expert(x[at])
    return out


@pytest.mark.parametrize("call", [by_mask, by_index, by_one_hot, by_nonzero])
def test_experts_can_be_routed_in_any_way(call: Callable[..., Tensor]) -> None:
    """As exact as if they were called for every token, and about as near to the exact values."""
    generator = torch.Generator().manual_seed(0)
    background, samples = (
        torch.randn(rows, 10, generator=generator, dtype=torch.float64) for rows in (1, 6)
    )
    exact = torch.stack([shapley_values(Experts(dense), x, background) for x in samples.split(1)])
    distances = []
    for model in (Experts(call), Experts(dense)):
        torch.testing.assert_close(model(samples), Experts(dense)(samples))
        explainable = fxshap.make_explainable(model)
        (values,) = assert_exact(model, explainable, [background], [samples], LIMITS[torch.float64])
        distances.append((torch.from_numpy(values) - exact).abs().sum())
    assert distances[0] <= 1.1 * distances[1]
