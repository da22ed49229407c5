"""Recurrent networks: layers in both layouts, and cells stepped by hand."""

from functools import partial

import torch
from torch import Tensor, nn

from tests.networks.network import Network

network = partial(Network, family="recurrent", shapes=((5, 2),), gain=2.0)


class Recurrent(nn.Module):
    """A recurrent layer over five steps; its last output is read out.

    Parameters
    ----------
    layer : nn.RNNBase
        A layer with two input features.
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        directions = 2 if layer.bidirectional else 1
        self.head = nn.Linear(directions * (layer.proj_size or layer.hidden_size), 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer and read out its last step."""
        if self.layer.batch_first:
            outputs, _ = self.layer(x)
            return self.head(outputs[:, -1])
        outputs, _ = self.layer(x.transpose(0, 1))
        return self.head(outputs[-1])


class ProjectedGRU(nn.Module):
    """Bidirectional GRUs, each read through a projection, which `nn.GRU` has none of.

    A linear layer between recurrent ones is the projection of Sak et al. (2014) without recurrence.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.GRU(size, 5, batch_first=True, bidirectional=True) for size in (2, 3)
        )
        self.projections = nn.ModuleList(nn.Linear(10, 3) for _ in range(2))
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers and read out the last step."""
        for layer, projection in zip(self.layers, self.projections, strict=True):
            x = projection(layer(x)[0])
        return self.head(x[:, -1])


class FinalState(nn.Module):
    """A bidirectional LSTM whose final hidden and cell states are read out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 4, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Join the states of both directions."""
        _, (hidden, cell) = self.lstm(x)
        return self.head(torch.cat([*hidden, *cell], dim=1))


class CellLoop(nn.Module):
    """An `nn.LSTMCell` and an `nn.GRUCell` stepped in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTMCell(2, 6)
        self.gru = nn.GRUCell(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Step both cells over the sequence."""
        hidden = cell = state = x.new_zeros(x.shape[0], 6)
        for step in x.unbind(dim=1):
            hidden, cell = self.lstm(step, (hidden, cell))
            state = self.gru(hidden, state)
        return self.head(state)


NETWORKS = [
    network("rnn_tanh", architecture=lambda: Recurrent(nn.RNN(2, 6, batch_first=True))),
    network("rnn_relu", architecture=lambda: Recurrent(nn.RNN(2, 6, nonlinearity="relu"))),
    network("lstm_time_first_stacked", architecture=lambda: Recurrent(nn.LSTM(2, 6, 2))),
    network(
        "lstm_stacked_bidirectional",
        architecture=lambda: Recurrent(nn.LSTM(2, 5, 2, batch_first=True, bidirectional=True)),
    ),
    network(
        "lstm_stacked_bidirectional_projected",
        architecture=lambda: Recurrent(nn.LSTM(2, 6, 2, bidirectional=True, proj_size=3)),
    ),
    network("lstm_bidirectional_state", architecture=FinalState),
    network(
        "gru_stacked_bidirectional",
        architecture=lambda: Recurrent(nn.GRU(2, 5, 2, batch_first=True, bidirectional=True)),
    ),
    network("gru_stacked_bidirectional_projected", architecture=ProjectedGRU),
    network("cells_in_a_loop", architecture=CellLoop),
]
