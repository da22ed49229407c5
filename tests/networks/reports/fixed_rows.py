"""Rows that Python counts or loops over, so that a graph has a fixed number of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.networks.reports.report import Report

report = partial(Report, family="fixed rows", shapes=((5, 2),))


class RowByRow(nn.Module):
    """Tokens of one row after the other, and a function of those of all rows."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.embed, self.out = nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([self.embed(row) for row in x])
        return self.out(self.function(tokens).mean(1))


def orthogonal(tokens: Tensor) -> Tensor:
    q, r = torch.linalg.qr(tokens.reshape(-1, 3, 2))
    return q * r.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)


def folded(tokens: Tensor) -> Tensor:
    """Rows and tokens in one dimension."""
    return orthogonal(tokens.reshape(-1, 6)).reshape(tokens.shape)


def steps_first(tokens: Tensor) -> Tensor:
    """As recurrent layers take them by default: (steps, rows, features)."""
    steps = tokens.transpose(0, 1)
    return orthogonal(steps).reshape(steps.shape).transpose(0, 1)


def rotated(tokens: Tensor) -> Tensor:
    """A rotation of every token, with the rows in the last dimension between."""
    a = tokens.permute(2, 1, 0)[:4].reshape(2, 2, -1).permute(2, 0, 1).tanh()
    turned = torch.matrix_exp(a - a.mT) @ a
    return turned.reshape(tokens.shape[1], -1, 4).transpose(0, 1).repeat(1, 1, 2)[..., :6]


def sorted_tokens(tokens: Tensor) -> Tensor:
    flat = tokens.reshape(-1, 6)
    return flat.gather(1, flat.argsort(1)).reshape(tokens.shape) * torch.linspace(0, 1, 6).to(flat)


REPORTS = [
    report("rows_folded", architecture=lambda: RowByRow(folded), source="x.reshape(-1, d)"),
    report("rows_second", architecture=lambda: RowByRow(steps_first), source="(T, B, d)"),
    report("rows_last", architecture=lambda: RowByRow(rotated), source="x.permute(2, 1, 0)"),
    report("rows_sorted", architecture=lambda: RowByRow(sorted_tokens), source="argsort"),
    report(  # as many steps as rows, when two samples are paired with five references
        "as_many_steps_as_rows",
        architecture=lambda: RowByRow(steps_first),
        shapes=((10, 2),),
        source="T == B",
    ),
]
