"""Indices that depend on the input: routing, codebooks, sorting and what is looked up by them."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.mlp import Between
from tests.networks.network import Network

network = partial(Network, family="choices")


class MixtureOfExperts(nn.Module):
    """The two best of five experts, token by token (Shazeer et al. 2017, eq. 2 and 5)."""

    def __init__(self, experts: int = 5, width: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(10, experts)
        self.into = nn.Parameter(torch.randn(experts, width, 10) / 3)
        self.out = nn.Parameter(torch.randn(experts, 3, width) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Look up the weights of the experts that the gate chooses."""
        weight, chosen = self.gate(x).softmax(-1).topk(2)
        hidden = torch.einsum("nkhi,ni->nkh", self.into[chosen], x)
        answers = torch.einsum("nkoh,nkh->nko", self.out[chosen], F.silu(hidden))
        return (answers * (weight / weight.sum(-1, keepdim=True)).unsqueeze(-1)).sum(1)


class Experts(nn.Module):
    """One of three experts for every token, or two, each called on the tokens that it finds.

    Parameters
    ----------
    chosen : int
        How many experts a token goes to: with one they find it by a mask (Fedus et al. 2022, eq.
        2), with two by its indices (Jiang et al. 2024, section 2.1).
    """

    def __init__(self, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.gate = nn.Linear(2, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 6), nn.GELU(), nn.Linear(6, 4)) for _ in range(3)
        )
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Route the tokens; all of the batch are in one dimension."""
        tokens = x.reshape(-1, 2)
        weights, experts = self.gate(tokens).softmax(-1).topk(self.chosen)
        out = tokens.new_zeros(len(tokens), 4)
        for number, expert in enumerate(self.experts):
            if self.chosen == 1:
                mask = experts[:, 0] == number
                out[mask] = weights[mask] * expert(tokens[mask])
            else:
                at, slot = torch.where(experts == number)
                out.index_add_(0, at, weights[at, slot, None] * expert(tokens[at]))
        return self.head(out.view(-1, 20))


class Codebook(nn.Module):
    """The nearest of six codes and what is left over (van den Oord et al. 2017, eq. 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(10, 4)
        self.codes = nn.Embedding(6, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Look up the code by the index of the smallest distance."""
        h = self.encoder(x)
        distances = (h.unsqueeze(1) - self.codes.weight).square().sum(-1)
        code = self.codes(distances.argmin(1))
        return self.head(torch.cat([code, (h - code).tanh()], 1))


def sparsemax(logits: Tensor) -> Tensor:
    """Project onto the simplex (Martins and Astudillo 2016, algorithm 1)."""
    ordered = logits.sort(-1, descending=True).values
    rank = torch.arange(1, logits.shape[-1] + 1, dtype=logits.dtype, device=logits.device)
    sums = ordered.cumsum(-1)
    support = (1 + rank * ordered > sums).sum(-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support
    return (logits - threshold).clamp(min=0)


def _grouped(h: Tensor) -> Tensor:
    groups = h.view(-1, 4, 3)
    best = groups.topk(2, -1).values.sum(-1).topk(2, -1, sorted=False).indices
    chosen = torch.zeros_like(groups[..., 0]).scatter(1, best, 1.0)
    return (groups.sigmoid() * chosen.unsqueeze(-1)).flatten(1)


def _keys_and_values(h: Tensor) -> Tensor:
    keys, values = h.chunk(2, 1)
    return values.tanh().gather(1, keys.argsort(1))[:, :3]


def _winners(h: Tensor) -> Tensor:
    largest = h.abs().topk(4, 1).indices
    return torch.zeros_like(h).scatter(1, largest, h.gather(1, largest))


def _row_of_the_best(h: Tensor) -> Tensor:
    rows = h.view(-1, 3, 4)
    return rows[torch.arange(len(rows)), rows.mean(2).argmax(1)].tanh()


NETWORKS = [
    network("mixture_of_experts", architecture=MixtureOfExperts),
    network("experts_by_mask", architecture=partial(Experts, 1), shapes=((5, 2),)),
    network("experts_by_index", architecture=partial(Experts, 2), shapes=((5, 2),)),
    network("codebook", architecture=Codebook),
    network("sparsemax", architecture=lambda: Between(lambda h: sparsemax(h).square())),
    network("group_routing", architecture=lambda: Between(_grouped)),
    network("values_by_keys", architecture=lambda: Between(_keys_and_values)),
    network("winners_scattered", architecture=lambda: Between(_winners)),
    network("row_of_the_best", architecture=lambda: Between(_row_of_the_best)),
]
