"""Mixtures of experts that loop over experts with tokens, and that sort and split their tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.networks.reports.report import Report

report = partial(Report, family="experts", shapes=((2, 4),))

#: ``route(experts, tokens, weights, chosen)`` returns what the chosen experts make of the tokens.
Route = Callable[[nn.ModuleList, Tensor, Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """Two of three experts for each of two tokens."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)) for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take tokens of shape (batch, 2, 4)."""
        tokens = x.reshape(-1, 4)
        weights, chosen = self.gate(tokens).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.head(self.route(self.experts, tokens, weights, chosen).reshape(-1, 8))


def with_tokens(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Call every expert that has tokens."""
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        at, slot = torch.where(chosen == number)
        if at.numel() == 0:
            continue
        y[at] += weights[at, slot, None] * expert(x[at])
    return y


def hit(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Loop over the numbers of the experts that have tokens."""
    y = torch.zeros_like(x)
    mask = nn.functional.one_hot(chosen, len(experts)).permute(2, 1, 0)
    for number in (mask.sum(dim=(-1, -2)) > 0).nonzero():
        slot, at = torch.where(mask[number].squeeze(0))
        y.index_add_(0, at, experts[number](x[at]) * weights[at, slot, None])
    return y


def split(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Sort the tokens, split them by the counts of the experts, and put them back."""
    order = chosen.view(-1).argsort()
    counts = torch.bincount(chosen.view(-1), minlength=len(experts)).tolist()
    parts = x[order // 2].split(counts)
    rows = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    y = torch.empty_like(rows)
    y[order] = rows
    return (y.view(*chosen.shape, -1) * weights.unsqueeze(-1)).sum(1)


def dispatcher(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """List the pairs of a token and an expert, sort them by expert, and split them."""
    gates = torch.zeros_like(x[:, : len(experts)]).scatter(1, chosen, weights)
    numbers, order = torch.nonzero(gates).sort(0)
    _, number = numbers.split(1, dim=1)
    token = torch.nonzero(gates)[order[:, 1], 0]
    parts = torch.split(x[token], (gates > 0).sum(0).tolist(), dim=0)
    rows = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)], 0)
    rows = rows.mul(torch.gather(gates[token.flatten()], 1, number))
    return torch.zeros(gates.size(0), 4, requires_grad=True).index_add(0, token, rows)


def joined(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Find the tokens of every expert, and add what all experts return at once."""
    found = [torch.where(chosen == number) for number in range(len(experts))]
    rows = [
        expert(x[at]) * weights[at, slot, None]
        for expert, (at, slot) in zip(experts, found, strict=True)
    ]
    return torch.zeros_like(x).index_add(0, torch.cat([at for at, _ in found]), torch.cat(rows))


def counted(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Skip the experts whose number of tokens is 0, as a Python number."""
    y = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        if int((chosen == number).sum()) == 0:
            continue
        at, slot = torch.where(chosen == number)
        y[at] += weights[at, slot, None] * expert(x[at])
    return y


def noisy(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Scatter the gates of the chosen experts into zeros, and multiply all experts by them."""
    gates = torch.zeros_like(x[:, : len(experts)]).scatter(1, chosen, weights)
    rows = [gates[:, k : k + 1] * expert(x) for k, expert in enumerate(experts)]
    return torch.stack(rows).sum(0)


REPORTS = [
    report("experts_with_tokens", architecture=partial(Experts, with_tokens), source="Mixtral"),
    report("experts_hit", architecture=partial(Experts, hit), source="Mixtral in transformers"),
    report("experts_split", architecture=partial(Experts, split), source="DeepSeek-V3"),
    report(
        "experts_dispatched",
        architecture=partial(Experts, dispatcher),
        source="davidmrau/mixture-of-experts, SparseDispatcher",
    ),
    report("experts_counted", architecture=partial(Experts, counted), source="a habit"),
    report("experts_noisy", architecture=partial(Experts, noisy), source="noisy top-k gating"),
    report("experts_joined", architecture=partial(Experts, joined), source="a habit"),
]
