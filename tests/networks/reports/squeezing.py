"""Models whose code means something else for a single row: ``squeeze()`` and its relatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tests.networks.reports.report import Report

report = partial(Report, family="squeezing")


class PooledImages(nn.Module):
    """A convolution, global pooling, and ``squeeze()``, as in most tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take images of shape (batch, 1, height, width)."""
        return self.classifier(self.features(x).squeeze())


class LastState(nn.Module):
    """A recurrent layer whose last state, of shape (1, batch, hidden), is squeezed."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(2, 5, batch_first=True)
        self.classifier = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take series of shape (batch, steps, 2)."""
        return self.classifier(self.recurrent(x)[1].squeeze())


class Regression(nn.Module):
    """A regression of one number, whose result goes through a function."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.head, self.end = nn.Linear(10, 6), nn.Linear(6, 1), end

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        return self.end(self.head(torch.tanh(self.hidden(x))))


class SkippedNorm(nn.Module):
    """A batch norm that is left out for a single row, on which training it would fail."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(10, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        h = self.hidden(x)
        if x.size(0) > 1:
            h = self.norm(h)
        return self.head(torch.relu(h))


class RestoredBatch(nn.Module):
    """A squeeze whose batch dimension is put back where it is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Conv1d(2, 5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 2, 5)."""
        h = torch.sigmoid(self.hidden(x)).squeeze()
        if h.dim() == 1:
            h = h.unsqueeze(0)
        return self.head(h)


def log_sum(y: Tensor) -> Tensor:
    """Reduce all numbers of a row to one."""
    return y.exp().sum().log()


class RowByRow(nn.Module):
    """A loop over the rows, whose results are stacked and squeezed."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.head, self.end = nn.Linear(10, 6), nn.Linear(6, 3), end

    def forward(self, x: Tensor) -> Tensor:
        """Take (batch, 10)."""
        rows = [self.end(self.head(torch.tanh(self.hidden(row[None])))) for row in x]
        return torch.stack(rows).squeeze()


def number(name: str, end: Callable[[Tensor], Tensor]) -> Report:
    """A regression with one output."""
    return report(
        name, architecture=partial(Regression, end), outputs=1, source="regression tutorials"
    )


REPORTS = [
    report(
        "pooled_images", architecture=PooledImages, shapes=((1, 3, 3),), source="image tutorials"
    ),
    report("last_state", architecture=LastState, shapes=((5, 2),), source="recurrent tutorials"),
    report("skipped_norm", architecture=SkippedNorm, source="training loops"),
    report("restored_batch", architecture=RestoredBatch, shapes=((2, 5),), source="signal models"),
    report(
        "squeezed_row_by_row", architecture=partial(RowByRow, torch.exp), source="loops over rows"
    ),
    report(
        "number_row_by_row",
        architecture=partial(RowByRow, log_sum),
        outputs=1,
        source="loops over rows",
    ),
    number("squeezed_number", lambda y: y.squeeze()),
    number("squeezed_last", lambda y: y.squeeze(-1)),
    number("viewed_number", lambda y: y.view(-1)),
    number("flattened_number", lambda y: y.flatten()),
    number("selected_number", lambda y: y[:, 0]),
    number("squeezed_rows", lambda y: y.squeeze(0)),
    number("first_of_one", lambda y: y[0] if len(y) == 1 else y),
]
