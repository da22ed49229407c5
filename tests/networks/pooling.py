"""Maxima and averages over windows, dimensions and pairs."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.mlp import Between
from tests.networks.network import Network

network = partial(Network, family="pooling")


class Pooled(nn.Module):
    """A convolution, a pooling and a linear head.

    Parameters
    ----------
    convolution : nn.Module
        The first layer.
    pool : callable
        Applied to the convolution's output.
    features : int
        The number of elements that the pooling leaves of each sample.
    """

    def __init__(
        self, convolution: nn.Module, pool: Callable[[Tensor], Tensor], features: int
    ) -> None:
        super().__init__()
        self.convolution = convolution
        self.pool = pool
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, pool and read out."""
        return self.head(self.pool(self.convolution(x)).flatten(1))


def _line() -> nn.Module:
    return nn.Conv1d(1, 3, 3, padding=1)


def _maximum_minimum(h: Tensor) -> Tensor:
    first, second = h.chunk(2, dim=1)
    return torch.maximum(first, second) - 2 * torch.minimum(first, second.tanh())


def _max_over_dims(h: Tensor) -> Tensor:
    rows = h.reshape(-1, 3, 4)
    maxima = [rows.max(dim=2).values, torch.max(rows, 1)[0], rows.amax(dim=(1, 2)).unsqueeze(1)]
    return torch.cat([*maxima, rows.amin(dim=2)], dim=1)


NETWORKS = [
    network(
        "max_pool1d",
        architecture=lambda: Pooled(_line(), nn.MaxPool1d(2), 15),
        shapes=((1, 10),),
    ),
    network(
        "max_pool1d_padded_dilated",
        architecture=lambda: Pooled(
            _line(), partial(F.max_pool1d, kernel_size=3, stride=2, padding=1, dilation=2), 12
        ),
        shapes=((1, 10),),
    ),
    network(
        "max_pool2d_overlapping",
        architecture=lambda: Pooled(
            nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d((2, 3), stride=1, padding=(1, 1)), 45
        ),
        shapes=((1, 2, 5),),
    ),
    network(
        "max_pool3d",
        architecture=lambda: Pooled(
            nn.Conv3d(1, 3, 3, padding=1), nn.MaxPool3d((1, 2, 2), stride=1), 12
        ),
        shapes=((1, 1, 2, 5),),
    ),
    network(
        "adaptive_max_pool",
        architecture=lambda: Pooled(_line(), nn.AdaptiveMaxPool1d(4), 12),
        shapes=((1, 10),),
    ),
    network("max_over_dims", architecture=lambda: Between(_max_over_dims)),
    network("maximum_minimum", architecture=lambda: Between(_maximum_minimum)),
    network(
        "average_pools",
        architecture=lambda: nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2, stride=1, padding=1),
            nn.Conv2d(6, 6, 2),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d((1, 3)),
            nn.Flatten(),
            nn.Linear(18, 3),
        ),
        shapes=((1, 2, 5),),
        shap_exact=True,
        gain=2.5,
    ),
]
