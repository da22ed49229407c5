"""Mixtures of experts that list their pairs of a token and an expert, and split the list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxshap
from fxshap._compat import TORCH
from fxshap.errors import CaptureError
from tests.capture.test_groups import Experts, Way, data, dense, distance
from tests.helpers import assert_exact, explain

pytestmark = pytest.mark.skipif(
    TORCH < (2, 7), reason="these ways to call experts are refused with torch.export of torch 2.6"
)


def gates_of(experts: nn.ModuleList, weights: Tensor, chosen: Tensor) -> Tensor:
    """The weight of every expert for every token."""
    return weights.new_zeros(weights.size(0), len(experts)).scatter(1, chosen, weights)


class Dispatcher:
    """As ``SparseDispatcher`` of many implementations of Shazeer et al. 2017."""

    def __init__(self, gates: Tensor) -> None:
        self.gates = gates
        numbers, order = torch.nonzero(gates).sort(0)
        _, self.number = numbers.split(1, dim=1)
        self.token = torch.nonzero(gates)[order[:, 1], 0]
        self.sizes = (gates > 0).sum(0).tolist()
        self.weights = torch.gather(gates[self.token.flatten()], 1, self.number)

    def dispatch(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x[self.token].squeeze(1), self.sizes, dim=0)

    def combine(self, rows: Tensor) -> Tensor:
        zeros = torch.zeros(self.gates.size(0), rows.size(1), requires_grad=True, dtype=rows.dtype)
        return zeros.index_add(0, self.token, rows)


def called(experts: nn.ModuleList, parts: tuple[Tensor, ...]) -> list[Tensor]:
    return [expert(part) for expert, part in zip(experts, parts, strict=True)]


def dispatcher(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    sent = Dispatcher(gates_of(experts, weights, chosen))
    return sent.combine(torch.cat(called(experts, sent.dispatch(x)), 0).mul(sent.weights))


def split_weights(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """With ``expert_to_gates``."""
    sent = Dispatcher(gates_of(experts, weights, chosen))
    parts = torch.split(sent.weights, sent.sizes, dim=0)
    rows = [row * part for row, part in zip(called(experts, sent.dispatch(x)), parts, strict=True)]
    return sent.combine(torch.cat(rows))


def by_logarithm(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """A logarithm of zero, where no token is, has a small number instead."""
    sent = Dispatcher(gates_of(experts, weights, chosen))
    rows = torch.cat(called(experts, sent.dispatch(x)), 0).exp().mul(sent.weights)
    total = sent.combine(rows)
    total[total == 0] = torch.finfo(torch.float64).eps
    return total.log()


def by_column(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    gates = gates_of(experts, weights, chosen)
    at = gates.nonzero()
    order = at[:, 1].argsort(stable=True)
    token, number = at[order].unbind(1)
    parts = x[token].split(gates.count_nonzero(0).tolist())
    rows = torch.cat(called(experts, parts)) * gates[token, number, None]
    return torch.zeros_like(x).index_add_(0, token, rows)


def by_expert(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """A list that is in the order of the experts."""
    gates = gates_of(experts, weights, chosen)
    number, token = gates.t().nonzero(as_tuple=True)
    parts = x[token].split((gates != 0).sum(0).tolist())
    rows = torch.cat(called(experts, parts)) * gates[token, number].unsqueeze(1)
    return torch.zeros_like(x).index_add(0, token, rows)


def layer_by_layer(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Split for each layer of the experts, as ``ParallelExperts`` of Granite and JetMoe."""
    sent = Dispatcher(gates_of(experts, weights, chosen))
    rows = torch.cat([e[0](part) for e, part in zip(experts, sent.dispatch(x), strict=True)])
    parts = experts[0][1](rows).split(sent.sizes)
    rows = torch.cat([e[2](part) for e, part in zip(experts, parts, strict=True)])
    return sent.combine(rows * sent.weights)


def joined(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The tokens that masks select, one expert after the other."""
    found = [torch.where(chosen == number) for number in range(len(experts))]
    rows = torch.cat(called(experts, tuple(x[at] for at, _ in found)))
    scale = torch.cat([weights[at, slot] for at, slot in found])
    token = torch.cat([at for at, _ in found])
    return torch.zeros_like(x).index_add(0, token, rows * scale.unsqueeze(1))


def unique_counts(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    flat = chosen.view(-1)
    order = flat.argsort()
    numbers, counts = torch.unique(flat, return_counts=True)
    parts = x[order // 2].split(counts.tolist())
    rows = [experts[k](part) for k, part in zip(numbers.tolist(), parts, strict=True)]
    return (torch.cat(rows)[order.argsort()].view(-1, 2, 4) * weights.unsqueeze(-1)).sum(1)


WAYS: list[Way] = [
    dispatcher, split_weights, by_column, by_expert, layer_by_layer, joined, unique_counts,
]  # fmt: skip


@pytest.fixture(scope="module")
def distance_of_dense() -> float:
    return distance(dense)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_values_are_about_as_near_as_if_every_expert_were_called(way, distance_of_dense):
    assert distance(way) <= 1.25 * distance_of_dense


def test_weights_of_exponentials_add_up():
    """As older versions of ``SparseDispatcher`` combine."""
    model = Experts(by_logarithm)
    assert_exact(model, fxshap.make_explainable(model), [data(1)], [data(4)], 1e-12)


def centred(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Every expert sees its tokens less their mean."""
    sent = Dispatcher(gates_of(experts, weights, chosen))
    parts = tuple(part - part.mean(0) for part in sent.dispatch(x))
    return sent.combine(torch.cat(called(experts, parts)) * sent.weights)


def cumulative(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    sent = Dispatcher(gates_of(experts, weights, chosen))
    return sent.combine(torch.cat(called(experts, sent.dispatch(x))).cumsum(0))


@pytest.mark.parametrize("way", [centred, cumulative], ids=lambda way: way.__name__)
def test_parts_whose_rows_influence_each_other_are_rejected(way):
    explainable = fxshap.make_explainable(Experts(way))
    with pytest.raises(CaptureError):
        explain(explainable, [data(5)], [data(3)])
