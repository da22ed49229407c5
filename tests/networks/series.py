"""Networks for series: forecasters and convolutions in time, the way their papers describe them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from tests.networks.network import Network

network = partial(Network, family="series")


class ConvolutionalLSTM(nn.Module):
    """An LSTM whose states are images, with peepholes (Shi et al. 2015, eq. 3).

    Convolutions take the place of the matrix products; the gates also look at the cell, each
    position through a weight of its own.
    """

    def __init__(self, size: tuple[int, int] = (1, 2), hidden: int = 4) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Conv2d(1 + hidden, 4 * hidden, 3, padding=1)
        self.peepholes = nn.Parameter(0.3 * torch.randn(3, hidden, *size))
        self.head = nn.Linear(hidden * size[0] * size[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        """Read images of shape (batch, time, 1, height, width) and take the last state."""
        hidden = cell = x.new_zeros(x.shape[0], self.hidden, *x.shape[3:])
        to_input, to_forget, to_output = self.peepholes
        for step in range(x.shape[1]):
            gates = self.gates(torch.cat([x[:, step], hidden], dim=1))
            i, f, g, o = gates.chunk(4, dim=1)
            i, f = torch.sigmoid(i + to_input * cell), torch.sigmoid(f + to_forget * cell)
            cell = f * cell + i * torch.tanh(g)
            hidden = torch.sigmoid(o + to_output * cell) * torch.tanh(cell)
        return self.head(hidden.flatten(1))


class TemporalBlock(nn.Module):
    """Two causal dilated convolutions with weight norm, a residual (Bai et al. 2018, fig. 1)."""

    def __init__(self, inside: int, outside: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.first = weight_norm(nn.Conv1d(inside, outside, 3, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(outside, outside, 3, dilation=dilation))
        self.dropout = nn.Dropout(0.2)
        self.short = nn.Conv1d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Look at the past only."""
        h = x
        for convolution in (self.first, self.second):
            h = self.dropout(F.relu(convolution(F.pad(h, (self.padding, 0)))))
        return F.relu(h + self.short(x))


class TemporalConvolutions(nn.Module):
    """A temporal convolution net (Bai et al. 2018): blocks of doubling dilation, the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(TemporalBlock(2, 6, 1), TemporalBlock(6, 6, 2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map series of shape (batch, variables, time)."""
        return self.head(self.blocks(x)[:, :, -1])


class Block(nn.Module):
    """A block of N-BEATS: a stack of layers and two bases (Oreshkin et al. 2020, section 3.1).

    Parameters
    ----------
    past, future : int
        How many steps are seen and forecast.
    bases : pair of Tensor, optional
        Fixed bases of past and future, of shape (coefficients, steps); learned ones by default.
    width : int
        The size of the layers.
    """

    def __init__(
        self, past: int, future: int, bases: tuple[Tensor, Tensor] | None = None, width: int = 8
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(past, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        count = 3 if bases is None else len(bases[0])
        self.coefficients = nn.ModuleList(nn.Linear(width, count, bias=False) for _ in range(2))
        if bases is None:
            self.backcast: nn.Module = nn.Linear(count, past)
            self.forecast: nn.Module = nn.Linear(count, future)
        else:
            self.backcast, self.forecast = FixedBasis(bases[0]), FixedBasis(bases[1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what it explains of the past, and its forecast."""
        h = self.layers(x)
        backward, forward = (layer(h) for layer in self.coefficients)
        return self.backcast(backward), self.forecast(forward)


class FixedBasis(nn.Module):
    """A sum of fixed functions of time."""

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis)

    def forward(self, coefficients: Tensor) -> Tensor:
        """Weigh the functions."""
        return coefficients @ self.basis


def trend(steps: int, degree: int = 2) -> Tensor:
    """Powers of time (Oreshkin et al. 2020, eq. 2)."""
    time = torch.arange(steps) / steps
    return torch.stack([time**power for power in range(degree + 1)])


def seasons(steps: int) -> Tensor:
    """The Fourier basis (Oreshkin et al. 2020, eq. 3)."""
    angles = 2 * torch.pi * torch.arange(steps) / steps
    waves = [wave(k * angles) for k in range(max(1, steps // 2)) for wave in (torch.cos, torch.sin)]
    return torch.stack(waves)


class NBeats(nn.Module):
    """N-BEATS (Oreshkin et al. 2020): doubly residual blocks of trend, season and learned bases."""

    def __init__(self, past: int = 10, future: int = 3) -> None:
        super().__init__()
        count = len(seasons(future))
        self.blocks = nn.ModuleList(
            [
                Block(past, future, (trend(past), trend(future))),
                Block(past, future, (seasons(past)[:count], seasons(future))),
                Block(past, future),
                Block(past, future),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Take away what each block explains and sum the forecasts."""
        total = x.new_zeros(())
        for block in self.blocks:
            backcast, forecast = block(x)
            x, total = x - backcast, total + forecast
        return total


class GaussianForecaster(nn.Module):
    """DeepAR's network and Gaussian head (Salinas et al. 2020, section 3.1 and eq. 3).

    The series is divided by 1 plus its mean size, so that series of any size look alike, and the
    mean and the standard deviation (a softplus) are multiplied by it again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 5, 2, batch_first=True)
        self.mean = nn.Linear(5, 1)
        self.scale = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return mean and standard deviation after series of shape (batch, time, 2)."""
        series, covariates = x[..., :1], x[..., 1:]
        size = 1 + series.abs().mean(1, keepdim=True)
        h = self.lstm(torch.cat([series / size, covariates], dim=2))[0][:, -1]
        return torch.cat([self.mean(h), F.softplus(self.scale(h))], dim=1) * size[:, 0]


NETWORKS = [
    network("convolutional_lstm", architecture=ConvolutionalLSTM, shapes=((5, 1, 1, 2),)),
    network("temporal_convolutions", architecture=TemporalConvolutions, shapes=((2, 5),)),
    network("n_beats", architecture=NBeats),
    network("deepar", architecture=GaussianForecaster, shapes=((5, 2),), outputs=2),
]
