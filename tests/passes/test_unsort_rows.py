"""Mixtures of experts that sort their tokens by expert, and put them back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxshap
from fxshap.verification.shapley import shapley_values
from tests.helpers import assert_exact, explain

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}
EXPERTS, TOKENS, WIDTH, CHOSEN = 3, 2, 4, 2


class Experts(nn.Module):
    """Two of three experts for each of two tokens, computed in one of several ways.

    The router has large weights, so that most samples are routed as most references are not.
    """

    def __init__(self, way: Callable[..., Tensor], chosen: int = CHOSEN) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.chosen = way, chosen
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.into = nn.Parameter(torch.randn(EXPERTS, 8, WIDTH) / 2)
        self.bias = nn.Parameter(torch.randn(EXPERTS, 8) / 2)
        self.out = nn.Parameter(torch.randn(EXPERTS, WIDTH, 8) / 2)
        self.head = nn.Linear(TOKENS * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Take tokens of shape (batch, TOKENS * WIDTH)."""
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(2 * tokens).softmax(-1).topk(self.chosen)
        y = self.way(self, tokens, weights / weights.sum(-1, keepdim=True), chosen)
        return self.head(y.reshape(-1, TOKENS * WIDTH))


def batched(m: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The matrices of its expert for every token, as ``batched_mm`` of transformers."""
    ids = chosen.reshape(-1)
    h = torch.bmm(m.into[ids], x.repeat_interleave(m.chosen, 0).unsqueeze(-1)).squeeze(-1)
    y = torch.bmm(m.out[ids], F.silu(h + m.bias[ids]).unsqueeze(-1)).squeeze(-1)
    return (y * weights.reshape(-1, 1)).view(len(x), m.chosen, -1).sum(1)


def by_row(m: Experts, rows: Tensor, ids: Tensor) -> Tensor:
    """The products of sorted rows with the matrices of their experts."""
    h = torch.bmm(m.into[ids], rows.unsqueeze(-1)).squeeze(-1)
    return torch.bmm(m.out[ids], F.silu(h + m.bias[ids]).unsqueeze(-1)).squeeze(-1)


def in_groups(m: Experts, rows: Tensor, ids: Tensor) -> Tensor:
    """The same, one product for each group of rows."""
    counts = torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    h = F.grouped_mm(rows, m.into.transpose(-2, -1), offs=ends)
    return F.grouped_mm(F.silu(h + m.bias[ids]), m.out.transpose(1, 2), offs=ends)


def in_groups_of_copies(m: Experts, rows: Tensor, ids: Tensor) -> Tensor:
    """The same, with matrices that are not transposed and offsets that are counted otherwise."""
    ends = (ids.unsqueeze(0) <= torch.arange(EXPERTS).unsqueeze(1)).sum(1).int()
    h = torch._grouped_mm(rows, m.into.mT.contiguous(), offs=ends)
    return torch._grouped_mm(F.silu(h + m.bias[ids]), m.out.mT.contiguous(), offs=ends)


Product = Callable[[Experts, Tensor, Tensor], Tensor]


def to_inverse(product: Product) -> Callable[..., Tensor]:
    """As ``grouped_mm`` of transformers does."""

    def way(m: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids, order = chosen.reshape(-1).sort()
        y = product(m, x[order // m.chosen], ids) * weights.reshape(-1)[order].unsqueeze(-1)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        return y[inverse].view(len(x), m.chosen, -1).sum(1)

    return way


def to_argsort(product: Product) -> Callable[..., Tensor]:
    def way(m: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        y = product(m, x.repeat_interleave(m.chosen, 0)[order], flat[order])[order.argsort()]
        return (y.unflatten(0, (-1, m.chosen)) * weights.unsqueeze(-1)).sum(1)

    return way


def to_assignment(product: Product) -> Callable[..., Tensor]:
    """As the code that came with DeepSeek-V3."""

    def way(m: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.view(-1).argsort()
        rows = product(m, x[order // chosen.shape[1]], chosen.view(-1)[order])
        y = torch.empty_like(rows)
        y[order] = rows
        return y.view(*chosen.shape, -1).mul_(weights.unsqueeze(-1)).sum(1)

    return way


def to_sum(product: Product) -> Callable[..., Tensor]:
    def way(m: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids, order = torch.sort(chosen.reshape(-1), stable=True)
        token = torch.arange(len(x)).repeat_interleave(m.chosen)[order]
        y = product(m, x[token], ids) * weights.reshape(-1, 1)[order]
        return torch.zeros_like(x).index_add(0, token, y)

    return way


def to_scatter(product: Product) -> Callable[..., Tensor]:
    def way(m: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids, order = chosen.reshape(-1).sort()
        token = torch.div(order, m.chosen, rounding_mode="floor")
        rows = product(m, x.index_select(0, token), ids)
        y = torch.zeros_like(rows).scatter(0, order.unsqueeze(-1).expand_as(rows), rows)
        return (y * weights.reshape(-1, 1)).view(len(x), m.chosen, -1).sum(1)

    return way


def to_scattered_sum(product: Product) -> Callable[..., Tensor]:
    """Sorted by slot first."""

    def way(m: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids, order = chosen.t().reshape(-1).sort()
        token = order % len(x)
        rows = product(m, x[token], ids) * weights.t().reshape(-1)[order, None]
        return torch.zeros_like(x).scatter_add(0, token[:, None].expand(-1, WIDTH), rows)

    return way


def to_gather(product: Product) -> Callable[..., Tensor]:
    def way(m: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids, order = chosen.reshape(-1).sort()
        inverse = torch.zeros_like(order).scatter(0, order, torch.arange(len(order)))
        rows = product(m, x[order // m.chosen], ids)
        y = rows.gather(0, inverse.unsqueeze(-1).expand(-1, WIDTH))
        return torch.einsum("nkd,nk->nd", y.view(len(x), m.chosen, -1), weights)

    return way


def to_place_of_the_order(product: Product) -> Callable[..., Tensor]:
    """The largest expert first."""

    def way(m: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids, order = chosen.reshape(-1).sort(descending=True)
        rows = product(m, x[order // m.chosen], ids)
        y = rows.index_select(0, order.argsort())
        return (y * weights.reshape(-1, 1)).view(len(x), m.chosen, -1).sum(1)

    return way


WAYS = [
    to_inverse, to_argsort, to_assignment, to_sum, to_scatter, to_scattered_sum, to_gather,
]  # fmt: skip


def data(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, TOKENS * WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def assert_as_batched(way: Callable[..., Tensor], dtype: torch.dtype, chosen: int = CHOSEN) -> None:
    """Check that values add up, and that they are those of the batched form, to rounding."""
    samples, background = data(4, dtype), data(5, dtype)
    model, expected = (Experts(f, chosen).to(dtype) for f in (way, batched))
    tokens = torch.cat([samples, background]).reshape(-1, WIDTH)
    routed = model.gate(2 * tokens).topk(chosen).indices.reshape(9, -1)
    assert chosen == EXPERTS or not (routed[:4] == routed[4:5]).all()
    torch.testing.assert_close(model(samples), expected(samples))
    explainable = fxshap.make_explainable(model)
    (values,) = assert_exact(model, explainable, [background], [samples], LIMITS[dtype])
    (others,) = explain(fxshap.make_explainable(expected), [background], [samples])
    assert abs(values - others).max() <= 10 * torch.finfo(dtype).eps * abs(others).max()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("put_back", [*WAYS, to_place_of_the_order], ids=lambda f: f.__name__)
def test_rows_that_are_put_back_have_the_values_of_unsorted_ones(put_back, dtype):
    assert_as_batched(put_back(by_row), dtype)


def takes_float32() -> bool:
    """Whether this release of torch multiplies groups of float32 rows on a CPU."""
    try:
        torch._grouped_mm(torch.ones(4, 4), torch.ones(1, 4, 4), offs=torch.tensor([4]).int())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return hasattr(F, "grouped_mm")


in_float32 = pytest.mark.skipif(not takes_float32(), reason="torch has no kernel for float32")


@in_float32
@pytest.mark.parametrize("put_back", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("product", [in_groups, in_groups_of_copies], ids=lambda f: f.__name__)
def test_grouped_products_have_the_values_of_batched_ones(product, put_back):
    assert_as_batched(put_back(product), torch.float32)


@in_float32
def test_one_expert_a_token():
    assert_as_batched(to_inverse(in_groups), torch.float32, chosen=1)


@in_float32
def test_every_expert():
    assert_as_batched(to_inverse(in_groups), torch.float32, chosen=EXPERTS)


def test_values_are_as_near_to_the_exact_ones_as_those_of_the_batched_form():
    background, samples = data(1, torch.float64), data(6, torch.float64)
    distances = []
    for way in (to_inverse(by_row), batched):
        model = Experts(way).double()
        (values,) = explain(fxshap.make_explainable(model), [background], [samples])
        exact = torch.stack([shapley_values(model, x, background) for x in samples.split(1)])
        distances.append(float((torch.from_numpy(values) - exact).abs().sum()))
    assert distances[0] == pytest.approx(distances[1], rel=1e-9)


@in_float32
@pytest.mark.parametrize("expert", range(EXPERTS))
def test_one_expert_may_get_all_tokens(expert):
    """Then the others get none."""
    model, expected = Experts(to_inverse(in_groups), 1), Experts(batched, 1)
    for made in (model, expected):
        made.gate.bias.data[expert] += 100
    samples, background = data(3), data(5)
    explainable = fxshap.make_explainable(model)
    (values,) = assert_exact(model, explainable, [background], [samples], 1e-5)
    (others,) = explain(fxshap.make_explainable(expected), [background], [samples])
    assert abs(values - others).max() <= 1e-6 * abs(others).max()


@in_float32
def test_ties_go_where_the_model_sends_them():
    model, expected = Experts(to_inverse(in_groups)), Experts(batched)
    for made in (model, expected):
        made.gate.weight.data[1] = made.gate.weight.data[2]
        made.gate.bias.data[1] = made.gate.bias.data[2]
    samples, background = data(3), data(5)
    explainable = fxshap.make_explainable(model)
    (values,) = assert_exact(model, explainable, [background], [samples], 1e-5)
    (others,) = explain(fxshap.make_explainable(expected), [background], [samples])
    assert abs(values - others).max() <= 1e-6 * abs(others).max()


@in_float32
def test_taps_take_as_much_memory_as_those_of_the_batched_form():
    samples = data(5)
    sizes = []
    for way in (to_inverse(in_groups), batched):
        explainable = fxshap.make_explainable(Experts(way), samples)
        sizes.append(sum(tap.nbytes for tap in explainable.tapped_graph(samples)[1]))
    assert sizes[0] <= 1.1 * sizes[1]


def mean_of_the_group(m: Experts, rows: Tensor, ids: Tensor) -> Tensor:
    return rows - rows.mean(0)


def cumulative(m: Experts, rows: Tensor, ids: Tensor) -> Tensor:
    return rows.cumsum(0)


@pytest.mark.parametrize("product", [cumulative], ids=lambda f: f.__name__)
def test_sorted_rows_that_influence_each_other_are_rejected(product):
    explainable = fxshap.make_explainable(Experts(to_inverse(product)))
    with pytest.raises(fxshap.errors.CaptureError, match="sorted rows"):
        explain(explainable, [data(5)], [data(3)])
