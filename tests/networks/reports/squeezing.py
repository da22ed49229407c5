"""Models that squeeze every dimension of size 1."""

from __future__ import annotations

from functools import partial

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


REPORTS = [
    report(
        "pooled_images", architecture=PooledImages, shapes=((1, 3, 3),), source="image tutorials"
    ),
    report("last_state", architecture=LastState, shapes=((5, 2),), source="recurrent tutorials"),
]
